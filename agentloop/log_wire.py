"""The log's protobuf messages as dataclasses."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from agentloop.errors import ConfigurationError
from agentloop.log_types import Feedback, Inference, InferencePage, InferenceStatus, Request
from agentloop.types import Message, Sampling, Tool
from agentloop.v1 import inference_pb2, log_pb2
from agentloop.wire import (
    FINISH_REASONS,
    TARGET_ROLE_NAMES,
    TOOL_CHOICE_NAMES,
    message_from_proto,
    valid,
)

_STATUSES: dict[InferenceStatus, log_pb2.InferenceStatus.ValueType] = {
    "started": log_pb2.INFERENCE_STATUS_STARTED,
    "ok": log_pb2.INFERENCE_STATUS_OK,
    "cancelled": log_pb2.INFERENCE_STATUS_CANCELLED,
    "deadline": log_pb2.INFERENCE_STATUS_DEADLINE,
    "error": log_pb2.INFERENCE_STATUS_ERROR,
    "aborted": log_pb2.INFERENCE_STATUS_ABORTED,
}
_STATUS_NAMES: dict[int, InferenceStatus] = {number: name for name, number in _STATUSES.items()}


@valid()
def list_request(
    *,
    since: datetime | None,
    until: datetime | None,
    session_id: str,
    model_version: str,
    status: InferenceStatus | None,
    caller: str,
    page_size: int,
    page_token: str,
) -> log_pb2.ListInferencesRequest:
    """The request for one page. Raises ConfigurationError for a time without a zone, or an unknown status."""
    if status is not None and status not in _STATUSES:
        raise ConfigurationError(f"status is {status!r}; it must be one of {', '.join(_STATUSES)}")
    return log_pb2.ListInferencesRequest(
        since=None if since is None else _timestamp("since", since),
        until=None if until is None else _timestamp("until", until),
        session_id=session_id,
        model_version=model_version,
        status=log_pb2.INFERENCE_STATUS_UNSPECIFIED if status is None else _STATUSES[status],
        caller=caller,
        page_size=page_size,
        page_token=page_token,
    )


def page_from_proto(response: log_pb2.ListInferencesResponse) -> InferencePage:
    """One page."""
    found = tuple(inference_from_proto(each) for each in response.inferences)
    return InferencePage(found, response.next_page_token)


def inference_from_proto(shown: log_pb2.Inference) -> Inference:
    """One row; of what this version of the client does not know, None."""
    return Inference(
        inference_id=shown.inference_id,
        caller=shown.caller,
        key_id=shown.key_id,
        alias=shown.alias,
        model_version=shown.model_version,
        target_role=TARGET_ROLE_NAMES.get(shown.target_role),
        session_id=shown.session_id,
        status=_STATUS_NAMES.get(shown.status),
        finish_reason=FINISH_REASONS.get(shown.finish_reason),
        error=shown.error,
        input_tokens=shown.usage.input_tokens,
        output_tokens=shown.usage.output_tokens,
        queue_ms=shown.timings.queue_ms,
        ttft_ms=shown.timings.time_to_first_token_ms,
        total_ms=shown.timings.total_ms,
        started_at=shown.started_at.ToDatetime(tzinfo=UTC),
        ended_at=shown.ended_at.ToDatetime(tzinfo=UTC) if shown.HasField("ended_at") else None,
        feedback_count=shown.feedback_count,
        request=_request(shown),
        answer=message_from_proto(shown.answer) if shown.HasField("answer") else None,
        feedback=tuple(_feedback(each) for each in shown.feedback),
    )


def _request(shown: log_pb2.Inference) -> Request | None:
    match shown.WhichOneof("request"):
        case "chat":
            chat = shown.chat
            return Request(
                messages=tuple(message_from_proto(each) for each in chat.messages),
                prompt="",
                tools=tuple(
                    Tool(each.name, each.description, json.loads(each.parameters_json_schema))
                    for each in chat.tools
                ),
                tool_choice=TOOL_CHOICE_NAMES.get(chat.tool_choice, "auto"),
                sampling=_sampling(chat.sampling),
                json_schema=_schema(chat),
            )
        case "generate":
            raw = shown.generate
            return Request((), raw.prompt, (), "none", _sampling(raw.sampling), _schema(raw))
        case _:
            return None


def _sampling(drawn: inference_pb2.SamplingOptions) -> Sampling:
    def given(name: str) -> Any:
        return getattr(drawn, name) if drawn.HasField(name) else None  # type: ignore[arg-type]

    return Sampling(
        temperature=given("temperature"),
        top_p=given("top_p"),
        top_k=given("top_k"),
        max_tokens=given("max_tokens"),
        seed=given("seed"),
        stop=tuple(drawn.stop),
    )


def _schema(request: inference_pb2.ChatRequest | inference_pb2.GenerateRequest) -> Any:
    if not request.HasField("response_format"):
        return None
    return json.loads(request.response_format.json_schema)


def _feedback(said: log_pb2.Feedback) -> Feedback:
    kind = said.WhichOneof("value")
    demonstration: Message | None = None
    if kind == "demonstration":
        demonstration = message_from_proto(said.demonstration)
    return Feedback(
        said.feedback_id,
        said.caller,
        said.created_at.ToDatetime(tzinfo=UTC),
        boolean=said.boolean if kind == "boolean" else None,
        score=said.score if kind == "score" else None,
        comment=said.comment if kind == "comment" else None,
        demonstration=demonstration,
    )


def _timestamp(name: str, moment: datetime) -> Timestamp:
    if moment.utcoffset() is None:
        raise ConfigurationError(f"{name} is {moment.isoformat()}, without a time zone; say which")
    value = Timestamp()
    value.FromDatetime(moment.astimezone(UTC))
    return value
