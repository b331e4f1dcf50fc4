"""Log lines are JSON, and hold no text of errors that nobody expected."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from grpc_server.domain.errors import EngineUnavailable
from grpc_server.json_logs import log_to


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    written = io.StringIO()
    log_to(written, "INFO")
    yield written
    root.handlers[:], root.level = handlers, level


def test_a_line_is_a_json_object_with_what_extra_gave(stream: io.StringIO) -> None:
    logging.getLogger("a").info("ready é", extra={"inference_id": "x", "count": 2})
    logging.getLogger("a").debug("not shown")
    line = json.loads(stream.getvalue())
    assert (line["level"], line["logger"], line["message"]) == ("INFO", "a", "ready é")
    assert (line["inference_id"], line["count"]) == ("x", 2)
    assert line["at"].endswith("+00:00")
    assert set(line) == {"at", "level", "logger", "message", "inference_id", "count"}


def test_an_unexpected_error_is_logged_by_kind_and_place_without_its_text(stream: io.StringIO) -> None:
    try:
        try:
            raise ValueError("a prompt")
        except ValueError as error:
            raise RuntimeError("another prompt") from error
    except RuntimeError:
        logging.getLogger("a").exception("unexpected error")
    line = json.loads(stream.getvalue())
    assert line["error"] == "RuntimeError, from ValueError"
    assert "test_json_logs.py" in line["traceback"][0]
    assert "prompt" not in stream.getvalue()


def test_an_error_of_ours_is_logged_with_its_text(stream: io.StringIO) -> None:
    try:
        raise EngineUnavailable("the engine is down")
    except EngineUnavailable:
        logging.getLogger("a").warning("a shadow failed", exc_info=True)
    assert json.loads(stream.getvalue())["error"] == "EngineUnavailable: the engine is down"
