"""Every error that httpx can raise is one of ours."""

from __future__ import annotations

import inspect

import aiohttp
import httpx
import pytest
from aiohttp import http_exceptions
from httpx_aiohttp.transport import map_aiohttp_exceptions

from grpc_server.adapters.http_errors import ERRORS, kind_of, translated
from grpc_server.domain.errors import AgentLoopError, EngineFailed, EngineUnavailable

EVERY_ERROR = [
    value
    for name in dir(httpx)
    if inspect.isclass(value := getattr(httpx, name)) and issubclass(value, Exception)
]
EVERY_ERROR_OF_AIOHTTP = [
    value
    for name in dir(aiohttp)
    if inspect.isclass(value := getattr(aiohttp, name)) and issubclass(value, aiohttp.ClientError)
] + [
    value
    for name in dir(http_exceptions)
    if inspect.isclass(value := getattr(http_exceptions, name)) and issubclass(value, Exception)
]


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_every_error_of_httpx_means_one_of_ours(kind: type[Exception]) -> None:
    error = kind.__new__(kind)
    assert issubclass(kind_of(error), AgentLoopError)
    if issubclass(kind, httpx.TransportError):
        assert kind_of(error) is EngineUnavailable
    else:
        assert kind_of(error) is EngineFailed


@pytest.mark.parametrize("kind", EVERY_ERROR_OF_AIOHTTP)
def test_every_error_of_aiohttp_means_one_of_ours_whether_it_was_translated_or_not(
    kind: type[Exception],
) -> None:
    with pytest.raises(Exception, match="x") as raised, map_aiohttp_exceptions():
        # Made without what they tell: how that is made differs.
        raise type(kind.__name__, (kind,), {"__init__": lambda _: None, "__str__": lambda _: "x"})()
    assert issubclass(kind_of(raised.value), AgentLoopError)


def test_the_mapping_names_only_errors_of_httpx_and_aiohttp() -> None:
    assert set(ERRORS) <= {*EVERY_ERROR, *EVERY_ERROR_OF_AIOHTTP}
    assert len(EVERY_ERROR) > 25


async def test_other_errors_pass_as_they_are() -> None:
    async def describe(_: Exception) -> str:
        raise AssertionError("not asked")

    with pytest.raises(KeyError):
        async with translated(describe):
            raise KeyError("x")
