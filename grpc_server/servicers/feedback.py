"""FeedbackService: what a caller says of an answer, onto the same road as the answers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import grpc
from uuid6 import uuid7

from agentloop.v1 import feedback_pb2 as pb
from agentloop.v1 import feedback_pb2_grpc as rpc
from grpc_server.domain.ports import Spool
from grpc_server.domain.rules import check_feedback
from grpc_server.domain.types import Feedback
from grpc_server.interceptors.auth import caller
from grpc_server.servicers import messages
from grpc_server.uninterrupted import uninterrupted


class FeedbackServicer(rpc.FeedbackServiceServicer):
    """Submit, to the spool; `logged` is told of each feedback that reached it."""

    def __init__(
        self,
        spool: Spool,
        *,
        logged: Callable[[Feedback], object] = lambda _: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        new_id: Callable[[], UUID] = uuid7,
    ) -> None:
        self._spool = spool
        self._logged = logged
        self._now = now
        self._new_id = new_id

    async def Submit(  # noqa: N802 - gRPC's name
        self, request: pb.SubmitRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SubmitResponse:
        """Return once the feedback is on disk; a second one with the same id changes nothing."""
        del context
        feedback = self._feedback(request)
        check_feedback(feedback)
        await uninterrupted(self._log(feedback))
        return pb.SubmitResponse(feedback_id=str(feedback.id))

    async def _log(self, feedback: Feedback) -> None:
        await self._spool.append(feedback)
        self._logged(feedback)

    def _feedback(self, request: pb.SubmitRequest) -> Feedback:
        who, value = caller(), request.WhichOneof("value")
        return Feedback(
            id=messages.uuid("feedback_id", request.feedback_id) if request.feedback_id else self._new_id(),
            inference_id=messages.uuid("inference_id", request.inference_id),
            caller=who.name,
            key_id=who.key_id,
            created_at=self._now(),
            learning=who.learning,
            text=who.text,
            boolean=request.boolean if value == "boolean" else None,
            score=request.score if value == "score" else None,
            comment=request.comment if value == "comment" else None,
            demonstration=(
                messages.message("demonstration", request.demonstration) if value == "demonstration" else None
            ),
        )
