"""The process that checks callers' schemas: begun with the first question, again after one that ended it."""

from __future__ import annotations

import json

from grpc_server.adapters.answering_process import AnsweringProcess, CannotStartError, ClosedError
from grpc_server.domain.errors import EngineUnavailable

CPU_SECONDS = 2.0
"""A schema of 64 KiB needs 0.2 s, unless it is one of those that need ages."""


class TooComplexError(Exception):
    """The process did not survive the question."""


class SchemaProcess:
    """Runs `json_schema_child`, which answers one question at a time, in `cpu_seconds` each."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._process = AnsweringProcess("grpc_server.adapters.json_schema_child", str(cpu_seconds))

    async def ask(self, schema: str, answer: str | None = None) -> str:
        """What is wrong with `schema` (JSON), or with `answer` by it; empty if nothing.

        Raises:
            TooComplexError: it takes too much time or memory to tell.
            EngineUnavailable: nobody can be asked.
        """
        try:
            reply = await self._process.ask(json.dumps({"schema": schema, "answer": answer}).encode() + b"\n")
        except ClosedError as error:
            raise EngineUnavailable("the engine is closed") from error
        except CannotStartError as error:
            raise EngineUnavailable("the JSON Schema cannot be checked now; try again") from error
        if not reply:
            raise TooComplexError
        return str(json.loads(reply)["problem"])

    async def close(self) -> None:
        """End the process, and start no other."""
        await self._process.close()
