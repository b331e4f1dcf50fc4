"""Whether the messages of a conversation stand where they may stand."""

from __future__ import annotations

from collections.abc import Sequence

from grpc_server.domain.types import Message, Role


def turns_out_of_order(messages: Sequence[Message]) -> int:
    """How many messages may not stand where they stand.

    System messages only first; then user and assistant in turns; tools answer an assistant that called them;
    the last to speak is the user or a tool.
    """
    spoken = list(messages)
    while spoken and spoken[0].role is Role.SYSTEM:
        spoken.pop(0)
    wrong = 0
    before: Message | None = None
    for message in spoken:
        wrong += not _may_follow(message, before)
        before = message
    return wrong + int(before is None or before.role not in (Role.USER, Role.TOOL))


def _may_follow(message: Message, before: Message | None) -> bool:
    match message.role:
        case Role.USER:
            return before is None or before.role is Role.ASSISTANT
        case Role.ASSISTANT:
            return before is not None and before.role in (Role.USER, Role.TOOL)
        case Role.TOOL:
            return before is not None and (before.role is Role.TOOL or bool(before.tool_calls))
        case _:
            return False
