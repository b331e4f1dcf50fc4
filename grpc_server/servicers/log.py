"""LogService: rows of the log to those who may see them."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from agentloop.v1 import inference_pb2, log_pb2
from agentloop.v1 import log_pb2_grpc as rpc
from grpc_server.domain import log_query
from grpc_server.domain.errors import InvalidArgument, NotFound
from grpc_server.domain.log_query import LogFilter, LoggedInference
from grpc_server.domain.plain import message_from_plain, raw_prompt, request_from_plain
from grpc_server.domain.ports import LogReader
from grpc_server.domain.types import Feedback, Scope, Status
from grpc_server.interceptors.auth import caller
from grpc_server.servicers import messages
from grpc_server.servicers.inference import FINISH_REASONS
from grpc_server.servicers.models import TARGET_ROLES

Context = grpc.aio.ServicerContext[Any, Any]

_STATUSES = {
    Status.STARTED: log_pb2.INFERENCE_STATUS_STARTED,
    Status.OK: log_pb2.INFERENCE_STATUS_OK,
    Status.CANCELLED: log_pb2.INFERENCE_STATUS_CANCELLED,
    Status.DEADLINE: log_pb2.INFERENCE_STATUS_DEADLINE,
    Status.ERROR: log_pb2.INFERENCE_STATUS_ERROR,
    Status.ABORTED: log_pb2.INFERENCE_STATUS_ABORTED,
}
_STATUS_OF = {number: status for status, number in _STATUSES.items()}


class LogServicer(rpc.LogServiceServicer):
    """A caller's own rows, by its name; an administrator's are all."""

    def __init__(self, reader: LogReader) -> None:
        self._reader = reader

    async def GetInference(  # noqa: N802 - gRPC's name
        self, request: log_pb2.GetInferenceRequest, context: Context
    ) -> log_pb2.GetInferenceResponse:
        """One row, whole. For another caller's the answer is that of an id that nobody has."""
        del context
        who = caller()
        identity = messages.uuid("inference_id", request.inference_id)
        row = await self._reader.get(identity, "" if who.may(Scope.ADMIN) else who.name)
        if row is None:
            raise NotFound(f"the log has no inference {identity} of yours; a new one takes a moment")
        return log_pb2.GetInferenceResponse(inference=_inference(row))

    async def ListInferences(  # noqa: N802 - gRPC's name
        self, request: log_pb2.ListInferencesRequest, context: Context
    ) -> log_pb2.ListInferencesResponse:
        """One page of rows, without their texts."""
        del context
        who = caller()
        wanted = log_query.allowed(who, _filter(request))
        below = log_query.below_of(request.page_token, who, wanted)
        page = await self._reader.page(wanted, below, log_query.page_size(request.page_size))
        return log_pb2.ListInferencesResponse(
            inferences=[_inference(row) for row in page.rows],
            next_page_token=log_query.page_token(who, wanted, page.below),
        )


def _filter(request: log_pb2.ListInferencesRequest) -> LogFilter:
    if request.status and request.status not in _STATUS_OF:
        names = ", ".join(log_pb2.InferenceStatus.keys())
        raise InvalidArgument(f"status is {request.status}; it must be one of {names}", "status")
    return LogFilter(
        caller=request.caller,
        since=_moment("since", request.since) if request.HasField("since") else None,
        until=_moment("until", request.until) if request.HasField("until") else None,
        session_id=request.session_id,
        model_version=request.model_version,
        status=_STATUS_OF.get(request.status),
    )


def _moment(field: str, value: Timestamp) -> datetime:
    """The moment. Raises InvalidArgument for one outside of the years 1970 to 9999."""
    try:
        moment = value.ToDatetime(tzinfo=UTC)
    except (OverflowError, ValueError):
        moment = None
    if moment is None or moment.year < 1970:
        raise InvalidArgument(
            f"{field} is {value.seconds} s after 1970; it must be in the years 1970 to 9999",
            field,
        )
    return moment


def _timestamp(moment: datetime) -> Timestamp:
    value = Timestamp()
    value.FromDatetime(moment)
    return value


def _inference(row: LoggedInference) -> log_pb2.Inference:
    shown = log_pb2.Inference(
        inference_id=str(row.id),
        caller=messages.printable(row.caller),
        key_id=messages.printable(row.key_id),
        alias=messages.printable(row.alias),
        model_version=messages.printable(row.model_version),
        target_role=TARGET_ROLES[row.target_role],
        session_id=messages.printable(row.session_id),
        status=_STATUSES[row.status],
        error=messages.printable(row.error),
        usage=messages.usage_to_proto(row.usage),
        timings=messages.timings_to_proto(row.timings),
        started_at=_timestamp(row.started_at),
        ended_at=None if row.ended_at is None else _timestamp(row.ended_at),
        feedback_count=row.feedback_count,
        feedback=[_feedback(each) for each in row.feedback],
    )
    if row.finish_reason is not None:
        shown.finish_reason = FINISH_REASONS[row.finish_reason]
    with contextlib.suppress(
        AttributeError, ValueError
    ):  # text that the log does not keep, or that is damaged
        _show_request(shown, row)
    with contextlib.suppress(AttributeError, ValueError):
        if row.answer and "withheld" not in row.answer:
            shown.answer.CopyFrom(messages.message_to_proto(message_from_plain(row.answer)))
    return shown


def _show_request(shown: log_pb2.Inference, row: LoggedInference) -> None:
    if not row.request or "withheld" in row.request:
        return
    prompt = raw_prompt(row.request)
    asked = request_from_plain(row.request, alias=row.alias, session_id=row.session_id)
    chat = messages.chat_to_proto(asked)
    if prompt is None:
        shown.chat.CopyFrom(chat)
        return
    shown.generate.CopyFrom(
        inference_pb2.GenerateRequest(
            alias=chat.alias,
            prompt=messages.printable(prompt),
            sampling=chat.sampling,
            response_format=chat.response_format if chat.HasField("response_format") else None,
            session_id=chat.session_id,
        )
    )


def _feedback(said: Feedback) -> log_pb2.Feedback:
    shown = log_pb2.Feedback(
        feedback_id=str(said.id),
        caller=messages.printable(said.caller),
        created_at=_timestamp(said.created_at),
    )
    if said.boolean is not None:
        shown.boolean = said.boolean
    elif said.score is not None:
        shown.score = said.score
    elif said.comment is not None:
        shown.comment = messages.printable(said.comment)
    elif said.demonstration is not None:
        shown.demonstration.CopyFrom(messages.message_to_proto(said.demonstration))
    return shown
