"""Log records as JSON: nothing is lost on the way, and what is no record is refused."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from hypothesis import given

from grpc_server.adapters.record_json import record_from_json, record_to_json
from grpc_server.domain.types import LogRecord, ServerStarted
from tests import records as make


@given(make.records)
def test_every_record_survives_nul_and_lone_surrogates_and_all(record: LogRecord) -> None:
    text = record_to_json(record)
    assert record_from_json(text) == record
    assert text.isascii()
    assert "\n" not in text


def test_a_line_can_be_read_by_a_person() -> None:
    value = json.loads(record_to_json(make.started(caller="billing")))
    assert value["type"] == "inference_started"
    assert value["caller"] == "billing"


def test_the_order_of_a_tools_parameters_is_kept() -> None:
    parameters = {"zeta": 1, "a": 2, "mid": 3}
    record = make.started(request={"tools": [{"parameters": parameters}]})
    again = record_from_json(record_to_json(record))
    assert list(again.request["tools"][0]["parameters"]) == ["zeta", "a", "mid"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "1",
        '{"type":"other"}',
        '{"type":"inference_started"}',
        pytest.param("[" * 100_000, id="nested 100,000 deep"),
    ],
)
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        record_from_json(text)


def test_a_field_with_an_unknown_value_is_refused() -> None:
    text = record_to_json(make.ended(make.new_id())).replace('"ok"', '"sideways"')
    with pytest.raises(ValueError, match="sideways"):
        record_from_json(text)


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        record_to_json(ServerStarted("server-1", datetime(2026, 1, 2)))


def test_a_value_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="InferenceStarted"):
        record_to_json(make.started(request={"messages": {1, 2}}))
