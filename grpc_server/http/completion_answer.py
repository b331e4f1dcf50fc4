"""An answer in the words of OpenAI's chat completions: chunks as it grows, or the whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from grpc_server.domain.plain import plain
from grpc_server.domain.types import ChatEvent, Completed, Started, TextDelta, ToolCall, Usage


@dataclass(slots=True)
class CompletionAnswer:
    """Takes the events of one chat. Its id is that of the inference, which feedback names."""

    include_usage: bool = False
    started: Started | None = None
    text: list[str] = field(default_factory=list)
    call: ToolCall | None = None
    completed: Completed | None = None

    def take(self, event: ChatEvent) -> list[dict[str, Any]]:
        """The chunks that tell of `event`."""
        match event:
            case Started():
                self.started = event
                return [self._chunk({"role": "assistant", "content": ""})]
            case TextDelta():
                self.text.append(event.text)
                return [self._chunk({"content": event.text})]
            case ToolCall():
                self.call = event
                return [self._chunk({"tool_calls": [{"index": 0, **self._call(event)}]})]
            case Completed():
                self.completed = event
                last = [self._chunk({}, event.finish_reason.value)]
                if self.include_usage:
                    counted = {"choices": [], "usage": usage(event.usage)}
                    last.append({**self._head("chat.completion.chunk"), **counted})
                return last

    def whole(self) -> dict[str, Any]:
        """The completion; call it after Completed."""
        assert self.completed is not None  # noqa: S101 - the pipeline returns after it
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.text), "refusal": None}
        if self.call is not None:
            message |= {"content": None, "tool_calls": [self._call(self.call)]}
        reason = self.completed.finish_reason.value
        return {
            **self._head("chat.completion"),
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
            "usage": usage(self.completed.usage),
        }

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        absent = {"usage": None} if self.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **absent}

    def _head(self, kind: str) -> dict[str, Any]:
        assert self.started is not None  # noqa: S101 - it is the first event
        id_ = self.started.inference_id
        return {
            "id": str(id_),
            "object": kind,
            "created": seconds_of(id_),
            "model": self.started.model_version,
        }

    def _call(self, call: ToolCall) -> dict[str, Any]:
        assert self.started is not None  # noqa: S101 - it is the first event
        arguments = json.dumps(plain(call.arguments), ensure_ascii=False)
        return {
            "id": f"call_{self.started.inference_id.hex}",  # a turn is one call
            "type": "function",
            "function": {"name": call.name, "arguments": arguments},
        }


def usage(counted: Usage) -> dict[str, int]:
    """Tokens, as OpenAI's API names them."""
    read, written = counted.input_tokens, counted.output_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def seconds_of(id_: UUID) -> int:
    """When a UUIDv7 was made, in seconds since 1970: its first 48 bits are milliseconds (RFC 9562, 5.7)."""
    return (id_.int >> 80) // 1000
