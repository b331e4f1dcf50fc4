"""What is wrong in a row of a snapshot, as counts: expectations judge these, and never see any text.

0 is good. What a row would teach, its demonstrations if it has any and else its answer, is held to more than
the rest: an answer that a caller has corrected may be as wrong as it likes.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

from jsonschema import Draft202012Validator
from referencing import Registry

from grpc_server.domain.plain import message_from_plain, raw_prompt, request_from_plain
from grpc_server.domain.types import ChatRequest, FinishReason, Message, Role, Status, Tool, ToolCall

FEATURES = (
    "malformed_id",
    "repeated_id",
    "unreadable_json",
    "unknown_status",
    "unknown_finish_reason",
    "disordered_times",
    "impossible_timings",
    "inconsistent_tokens",
    "missing_prompt",
    "missing_answer",
    "unprintable_characters",
    "turns_out_of_order",
    "invalid_tools",
    "invalid_tool_calls",
    "invalid_demonstrations",
    "invalid_feedback",
    "failed",
)

_ENDED = {status.value for status in Status} - {Status.STARTED.value}
_FAILED = {Status.ERROR.value, Status.ABORTED.value}
_FINISH_REASONS = {reason.value for reason in FinishReason}
_VALUES = ("boolean", "score", "comment", "demonstration")
# Control characters but tab, line feed and carriage return; lone surrogates; Unicode's noncharacters of the
# first plane.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# Engines count an end-of-turn token or do not.
_UNCOUNTED_TOKENS = 1
# Start, first token and end are read from the clock one after the other.
_CLOCK_SLACK_MS = 1.0
# Of processor time: a schema of 64 KiB, the largest that is taken, needs 1.3 s; arguments need milliseconds.
_SCHEMA_SECONDS = 5.0
_ARGUMENTS_SECONDS = 0.5


def features(row: Mapping[str, Any]) -> dict[str, int]:
    """How often each thing is wrong in one row; `repeated_id` needs all rows and is 0 here."""
    found = dict.fromkeys(FEATURES, 0)
    found["malformed_id"] = int(not _is_uuid(row["inference_id"]))
    found["unknown_status"] = int(row["status"] not in _ENDED)
    found["unknown_finish_reason"] = int(_finish_reason_is_wrong(row))
    found["disordered_times"] = int(_times_are_disordered(row))
    found["impossible_timings"] = _impossible_timings(row)
    found["failed"] = int(row["status"] in _FAILED)
    try:
        asked = json.loads(row["request_json"])
        prompt, request = raw_prompt(asked), request_from_plain(asked)
        answer = message_from_plain({"role": "assistant"} | json.loads(row["answer_json"] or "{}"))
        feedback = json.loads(row["feedback_json"] or "[]")
        demonstrations = [
            message_from_plain(each["demonstration"])
            for each in feedback
            if each["demonstration"] is not None
        ]
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        found["unreadable_json"] = 1
        return found
    answered = row["status"] == Status.OK.value
    taught = demonstrations or [answer]
    found["inconsistent_tokens"] = int(_tokens_are_inconsistent(row, request, answer))
    found["missing_answer"] = int(answered and not any(map(_says_something, taught)))
    found["invalid_feedback"] = sum(sum(each.get(v) is not None for v in _VALUES) != 1 for each in feedback)
    if prompt is not None:  # a raw prompt has no turns and no tools, and curation learns nothing from it
        found["missing_prompt"] = int(not prompt)
        return found
    found["missing_prompt"] = int(
        not any(_has_text(each) for each in request.messages if each.role is Role.USER)
    )
    found["unprintable_characters"] = sum(
        len(_UNPRINTABLE.findall(text)) for text in _texts((*request.messages, *taught), request.tools)
    )
    found["turns_out_of_order"] = turns_out_of_order(request.messages)
    found["invalid_tools"] = _invalid_tools(request.tools)
    if not found["invalid_tools"]:
        if answered and not demonstrations:
            found["invalid_tool_calls"] = _invalid_calls(answer.tool_calls, request.tools)
        found["invalid_demonstrations"] = sum(
            not _demonstration_is_valid(each, request.tools) for each in demonstrations
        )
    return found


def _is_uuid(value: Any) -> bool:
    try:
        return bool(str(UUID(value)) == value)
    except (AttributeError, TypeError, ValueError):
        return False


def _finish_reason_is_wrong(row: Mapping[str, Any]) -> bool:
    """An inference that went well has ended for a known reason; any other may have none."""
    reason = row["finish_reason"]
    if reason is None:
        return str(row["status"]) == Status.OK.value
    return str(reason) not in _FINISH_REASONS


def _times_are_disordered(row: Mapping[str, Any]) -> bool:
    started, ended = row["started_at"], row["ended_at"]
    return started is None or ended is None or bool(ended < started)


def _impossible_timings(row: Mapping[str, Any]) -> int:
    """How many of queue, first token and total are below zero, missing, or later than what they precede."""
    total, first = row["total_ms"], row["ttft_ms"]
    latest = float("inf") if total is None else total + _CLOCK_SLACK_MS
    return sum(
        (
            total is None or not total >= 0,
            row["queue_ms"] is None or not 0 <= row["queue_ms"] <= latest,
            first is not None and not 0 <= first <= latest,
        )
    )


def _tokens_are_inconsistent(row: Mapping[str, Any], request: ChatRequest, answer: Message) -> bool:
    """Counts below zero, more than was allowed, or none for an answer that says something."""
    read, written = row["input_tokens"], row["output_tokens"]
    if read is None or written is None or read < 0 or written < 0:
        return True
    if written > request.sampling.max_tokens + _UNCOUNTED_TOKENS:
        return True
    answered = row["status"] == Status.OK.value
    return answered and (read == 0 or (written == 0 and _says_something(answer)))


def _has_text(message: Message) -> bool:
    return bool(message.content.strip())


def _says_something(message: Message) -> bool:
    return _has_text(message) or bool(message.tool_calls)


def _texts(messages: Iterable[Message], tools: Iterable[Tool]) -> Iterable[str]:
    """Every text that a prompt or an answer is rendered from."""
    for message in messages:
        yield message.content
        yield message.tool_name
        for call in message.tool_calls:
            yield call.name
            yield from _leaves(call.arguments)
    for tool in tools:
        yield tool.name
        yield tool.description
        yield from _leaves(tool.parameters)


def _leaves(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _leaves(item)


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


def _invalid_tools(tools: Sequence[Tool]) -> int:
    """How many tools have no name, a name twice, or parameters that are no JSON Schema."""
    repeated = len(tools) - len({tool.name for tool in tools})
    return repeated + sum(not tool.name or _validator(_key(tool.parameters)) is None for tool in tools)


def _invalid_calls(calls: Sequence[ToolCall], tools: Sequence[Tool]) -> int:
    return sum(not _call_is_valid(call, tools) for call in calls)


def _call_is_valid(call: ToolCall, tools: Sequence[Tool]) -> bool:
    """Whether the tool was offered and its schema allows the arguments."""
    for tool in tools:
        if tool.name == call.name:
            validator = _validator(_key(tool.parameters))
            try:
                with _within(_ARGUMENTS_SECONDS):
                    return validator is not None and validator.is_valid(call.arguments)
            except Exception:  # a schema that points nowhere, at itself, has a broken pattern, …
                return False
    return False


def _demonstration_is_valid(message: Message, tools: Sequence[Tool]) -> bool:
    """An assistant's turn that says something, every call of it one of the tools', by their schemas."""
    return (
        message.role is Role.ASSISTANT
        and _says_something(message)
        and _invalid_calls(message.tool_calls, tools) == 0
    )


def _key(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, sort_keys=True)


@lru_cache(maxsize=4096)
def _validator(schema_json: str) -> Draft202012Validator | None:
    """The validator of a schema, or None if it is none; what it refers to elsewhere is never fetched."""
    schema = json.loads(schema_json)
    try:
        with _within(_SCHEMA_SECONDS):
            Draft202012Validator.check_schema(schema)
    except Exception:  # SchemaError, and whatever else a caller's schema does to the library
        return None
    return Draft202012Validator(schema, registry=Registry())


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after so much processor time: a caller's pattern may take years.

    Python's `re` and the interpreter look after signals. Only for the main thread, which is where checks run.
    """

    def too_long(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
