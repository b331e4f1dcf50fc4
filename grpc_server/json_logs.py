"""Log lines as JSON objects: what happened, to which id; never what anyone wrote."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import TextIO

from opentelemetry import trace

from grpc_server.domain.errors import AgentLoopError

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: at, level, logger, message, whatever `extra` gave, error and traceback.

    In a call whose caller named a trace, or that is recorded, also trace_id and span_id.

    Of an error that is not ours only the kind is written: its text may quote what someone wrote.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace_id"] = trace.format_trace_id(span.trace_id)
            line["span_id"] = trace.format_span_id(span.span_id)
        line.update({key: value for key, value in vars(record).items() if key not in _OWN})
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = _kind(record.exc_info[1])
            line["traceback"] = [
                f"{frame.filename}:{frame.lineno} {frame.name}"
                for frame in traceback.extract_tb(record.exc_info[2])
            ]
        return json.dumps(line, ensure_ascii=False, default=str)


def _kind(error: BaseException) -> str:
    kind = f"{type(error).__name__}: {error}" if isinstance(error, AgentLoopError) else type(error).__name__
    cause = error.__cause__
    return kind if cause is None else f"{kind}, from {_kind(cause)}"


def log_to(stream: TextIO = sys.stderr, level: str = "INFO") -> None:
    """Write every log line of this process to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "alembic.runtime.plugins"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
