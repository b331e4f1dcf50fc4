"""WebArena's tasks (`test.raw.json`, and WebArena Verified's): an array of `{"task_id", "intent", ...}`.

A task says what to reach, and not how: it has no answer that could be taught, and is kept as a request.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from grpc_server.domain.types import ChatRequest, Message, Role
from training.datasets.shown import Published, Record, Shown

PAGE = "https://github.com/web-arena-x/webarena/tree/main/config_files"


class _Task(Published):
    task_id: int
    intent: str = Field(min_length=1)
    sites: list[str] = Field(min_length=1)


def recognises(record: Record) -> bool:
    """Whether it is a task with an intent."""
    return "task_id" in record and "intent" in record


def shown(record: Record) -> Iterator[Shown | str]:
    """The request that a task is.

    Raises:
        pydantic.ValidationError: naming the field that is not as the page says.
    """
    task = _Task.model_validate(record)
    request = ChatRequest((Message(Role.USER, task.intent),))
    yield Shown(f"webarena.{task.task_id}", request, None)
