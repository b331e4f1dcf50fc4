"""Every error that httpx can raise is one of ours."""

from __future__ import annotations

import inspect

import httpx
import pytest

from grpc_server.adapters.http_errors import ERRORS, kind_of, translated
from grpc_server.domain.errors import AgentLoopError, EngineFailed, EngineUnavailable

EVERY_ERROR = [
    value
    for name in dir(httpx)
    if inspect.isclass(value := getattr(httpx, name)) and issubclass(value, Exception)
]


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_every_error_of_httpx_means_one_of_ours(kind: type[Exception]) -> None:
    error = kind.__new__(kind)
    assert issubclass(kind_of(error), AgentLoopError)
    if issubclass(kind, httpx.TransportError):
        assert kind_of(error) is EngineUnavailable
    else:
        assert kind_of(error) is EngineFailed


def test_the_mapping_names_only_errors_of_httpx() -> None:
    assert set(ERRORS) <= set(EVERY_ERROR)
    assert len(EVERY_ERROR) > 25


async def test_other_errors_pass_as_they_are() -> None:
    async def describe(_: Exception) -> str:
        raise AssertionError("not asked")

    with pytest.raises(KeyError):
        async with translated(describe):
            raise KeyError("x")
