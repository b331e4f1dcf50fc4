"""The synchronous client: `AsyncClient` for scripts that have no event loop. Same calls, same rules."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agentloop import log_wire, wire
from agentloop.client import CALL_TIMEOUT_S, CHAT_TIMEOUT_S, INSTALL_TIMEOUT_S, LEASE_TIMEOUT_S
from agentloop.connection import Priority, connection
from agentloop.errors import IncompleteStream, from_grpc
from agentloop.log_types import Inference, InferencePage, InferenceStatus
from agentloop.retry import Attempts
from agentloop.types import (
    Answer,
    ChatEvent,
    Completed,
    Embeddings,
    GpuHandover,
    GpuLease,
    InstallProgress,
    JsonObject,
    Message,
    ModelDetails,
    ModelVersion,
    Route,
    Sampling,
    Started,
    Target,
    TokenCount,
    Tool,
    ToolChoice,
)
from agentloop.v1 import (
    feedback_pb2_grpc,
    gpu_pb2,
    gpu_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    log_pb2,
    log_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

Request = TypeVar("Request")
Response = TypeVar("Response")


class Client:
    """Calls the service and waits. Use it as a context manager, or `close()` when done."""

    def __init__(
        self,
        server: str | None = None,
        token: str | None = None,
        *,
        token_file: str | Path | None = None,
        ca_file: str | Path | None = None,
        priority: Priority | None = None,
    ) -> None:
        """As `AsyncClient`."""
        self._connection = connection(server, token, token_file, ca_file, priority)
        self._channel = self._connection.open()
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._log = log_pb2_grpc.LogServiceStub(self._channel)
        self._feedback = feedback_pb2_grpc.FeedbackServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._gpu = gpu_pb2_grpc.GpuServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        self._channel.close()

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        sampling: Sampling | None = None,
        json_schema: JsonObject | None = None,
        alias: str = "",
        model_version: str = "",
        session_id: str = "",
        timeout_s: float = CHAT_TIMEOUT_S,
    ) -> Generator[ChatEvent, None, None]:
        """As `AsyncClient.chat`."""
        request = wire.chat_request(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            sampling=sampling or Sampling(),
            json_schema=json_schema,
            alias=alias,
            model_version=model_version,
            session_id=session_id,
        )
        yield from self._events(self._inference.Chat, request, timeout_s)

    def generate(
        self,
        prompt: str,
        *,
        sampling: Sampling | None = None,
        json_schema: JsonObject | None = None,
        alias: str = "",
        model_version: str = "",
        session_id: str = "",
        timeout_s: float = CHAT_TIMEOUT_S,
    ) -> Generator[ChatEvent, None, None]:
        """As `AsyncClient.generate`."""
        request = wire.generate_request(
            prompt,
            sampling=sampling or Sampling(),
            json_schema=json_schema,
            alias=alias,
            model_version=model_version,
            session_id=session_id,
        )
        yield from self._events(self._inference.Generate, request, timeout_s)

    def _events(
        self,
        method: Callable[..., Any],
        request: inference_pb2.ChatRequest | inference_pb2.GenerateRequest,
        timeout_s: float,
    ) -> Generator[ChatEvent, None, None]:
        attempts = Attempts.within(timeout_s)
        while True:
            try:
                yield from self._stream(method, request, attempts)
                return
            except grpc.RpcError as error:
                delay = attempts.delay_after(error)
                if delay is None:
                    raise from_grpc(error) from error
            time.sleep(delay)

    def _stream(
        self,
        method: Callable[..., Any],
        request: inference_pb2.ChatRequest | inference_pb2.GenerateRequest,
        attempts: Attempts,
    ) -> Generator[ChatEvent, None, None]:
        """One try. Raises grpc.RpcError only before its first event: after it, the error is final."""
        call = method(request, timeout=attempts.remaining_s, metadata=self._connection.metadata)
        inference_id = ""
        begun = completed = False
        try:
            for response in call:
                begun = True
                event = wire.event_from_proto(response)
                if isinstance(event, Started):
                    inference_id = event.inference_id
                completed = completed or isinstance(event, Completed)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            if begun:
                raise from_grpc(error, inference_id) from error
            raise
        finally:
            call.cancel()
        if not completed:
            raise IncompleteStream(f"the stream of inference {inference_id!r} ended without its last event")

    def ask(self, messages: str | Sequence[Message], **options: Any) -> Answer:
        """As `AsyncClient.ask`."""
        return wire.collect(self.chat(messages, **options))

    def count_tokens(
        self,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = "auto",
        json_schema: JsonObject | None = None,
        alias: str = "",
        model_version: str = "",
        session_id: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> TokenCount:
        """As `AsyncClient.count_tokens`."""
        chat = wire.chat_request(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            sampling=Sampling(),
            json_schema=json_schema,
            alias=alias,
            model_version=model_version,
            session_id=session_id,
        )
        request = inference_pb2.CountTokensRequest(chat=chat)
        response = self._call(self._inference.CountTokens, request, timeout_s)
        return TokenCount(response.input_tokens, response.model_version)

    def count_prompt_tokens(
        self, prompt: str, *, alias: str = "", model_version: str = "", timeout_s: float = CALL_TIMEOUT_S
    ) -> TokenCount:
        """As `AsyncClient.count_prompt_tokens`."""
        generate = wire.generate_request(
            prompt,
            sampling=Sampling(),
            json_schema=None,
            alias=alias,
            model_version=model_version,
            session_id="",
        )
        request = inference_pb2.CountTokensRequest(generate=generate)
        response = self._call(self._inference.CountTokens, request, timeout_s)
        return TokenCount(response.input_tokens, response.model_version)

    def embed(
        self,
        texts: Sequence[str],
        *,
        alias: str = "",
        model_version: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Embeddings:
        """As `AsyncClient.embed`."""
        request = wire.embed_request(texts, alias, model_version)
        return wire.embeddings_from_proto(self._call(self._inference.Embed, request, timeout_s))

    def cancel(self, inference_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """As `AsyncClient.cancel`."""
        request = inference_pb2.CancelInferenceRequest(inference_id=inference_id)
        self._call(self._inference.CancelInference, request, timeout_s, safe=False)

    def get_inference(self, inference_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Inference:
        """As `AsyncClient.get_inference`."""
        request = log_pb2.GetInferenceRequest(inference_id=inference_id)
        response = self._call(self._log.GetInference, request, timeout_s)
        return log_wire.inference_from_proto(response.inference)

    def list_inferences(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        session_id: str = "",
        model_version: str = "",
        status: InferenceStatus | None = None,
        caller: str = "",
        page_size: int = 0,
        page_token: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> InferencePage:
        """As `AsyncClient.list_inferences`."""
        request = log_wire.list_request(
            since=since,
            until=until,
            session_id=session_id,
            model_version=model_version,
            status=status,
            caller=caller,
            page_size=page_size,
            page_token=page_token,
        )
        response = self._call(self._log.ListInferences, request, timeout_s)
        return log_wire.page_from_proto(response)

    def inferences(self, **wanted: Any) -> Generator[Inference, None, None]:
        """As `AsyncClient.inferences`."""
        token = ""
        while True:
            page = self.list_inferences(**wanted, page_token=token)
            yield from page.inferences
            token = page.next_page_token
            if not token:
                return

    def submit_feedback(
        self,
        inference_id: str,
        *,
        boolean: bool | None = None,
        score: float | None = None,
        comment: str | None = None,
        demonstration: Message | None = None,
        feedback_id: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> str:
        """As `AsyncClient.submit_feedback`."""
        request = wire.feedback_request(
            inference_id,
            feedback_id or str(uuid.uuid4()),
            boolean=boolean,
            score=score,
            comment=comment,
            demonstration=demonstration,
        )
        return self._call(self._feedback.Submit, request, timeout_s).feedback_id

    def list_models(self, *, timeout_s: float = CALL_TIMEOUT_S) -> list[ModelVersion]:
        """As `AsyncClient.list_models`."""
        response = self._call(self._models.ListModels, model_pb2.ListModelsRequest(), timeout_s)
        return [wire.model_from_proto(model) for model in response.models]

    def get_model(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> ModelDetails:
        """As `AsyncClient.get_model`."""
        request = model_pb2.GetModelRequest(name=name)
        return wire.details_from_proto(self._call(self._models.GetModel, request, timeout_s))

    def install_model(
        self,
        name: str,
        path: str | Path,
        sha256: str,
        *,
        on_progress: Callable[[InstallProgress], None] | None = None,
        timeout_s: float = INSTALL_TIMEOUT_S,
    ) -> tuple[ModelVersion, bool]:
        """As `AsyncClient.install_model`."""
        request = model_pb2.InstallModelRequest(name=name, path=str(path), sha256=sha256)

        def tell(install: model_pb2.InstallModelRequest, **options: Any) -> Any:
            stream = model_pb2.InstallModelStreamRequest(install=install)
            for response in self._models.InstallModelStream(stream, **options):
                if response.WhichOneof("event") == "installed":
                    return response.installed
                if on_progress is not None:
                    on_progress(wire.progress_from_proto(response.progress))
            raise IncompleteStream(f"the installation of {name} ended without a result; install it again")

        method = self._models.InstallModel if on_progress is None else tell
        response = self._call(method, request, timeout_s)
        return wire.model_from_proto(response.model), response.changed

    def load_model(self, name: str, *, timeout_s: float = INSTALL_TIMEOUT_S) -> tuple[ModelVersion, bool]:
        """As `AsyncClient.load_model`."""
        request = model_pb2.LoadModelRequest(name=name)
        response = self._call(self._models.LoadModel, request, timeout_s)
        return wire.model_from_proto(response.model), response.changed

    def unload_model(
        self, name: str, *, force: bool = False, timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[ModelVersion, bool]:
        """As `AsyncClient.unload_model`."""
        request = model_pb2.UnloadModelRequest(name=name, force=force)
        response = self._call(self._models.UnloadModel, request, timeout_s, safe=False)
        return wire.model_from_proto(response.model), response.changed

    def remove_model(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """As `AsyncClient.remove_model`."""
        request = model_pb2.RemoveModelRequest(name=name)
        return self._call(self._models.RemoveModel, request, timeout_s, safe=False).changed

    def get_route(self, alias: str = "", *, timeout_s: float = CALL_TIMEOUT_S) -> Route:
        """As `AsyncClient.get_route`."""
        request = model_pb2.GetRouteRequest(alias=alias)
        return wire.route_from_proto(self._call(self._models.GetRoute, request, timeout_s).route)

    def set_route(
        self, alias: str, targets: Sequence[Target], revision: int, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Route:
        """As `AsyncClient.set_route`."""
        request = model_pb2.SetRouteRequest(route=wire.route_to_proto(alias, targets, revision))
        response = self._call(self._models.SetRoute, request, timeout_s, safe=False)
        return wire.route_from_proto(response.route)

    def lease_gpu(self, holder: str, *, timeout_s: float = LEASE_TIMEOUT_S) -> GpuLease:
        """As `AsyncClient.lease_gpu`."""
        request = gpu_pb2.LeaseGpuRequest(holder=holder)
        return wire.lease_from_proto(self._call(self._gpu.LeaseGpu, request, timeout_s, safe=False).lease)

    def renew_gpu_lease(self, lease_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> GpuLease:
        """As `AsyncClient.renew_gpu_lease`."""
        request = gpu_pb2.RenewGpuLeaseRequest(lease_id=lease_id)
        return wire.lease_from_proto(self._call(self._gpu.RenewGpuLease, request, timeout_s).lease)

    def release_gpu_lease(self, lease_id: str, *, timeout_s: float = LEASE_TIMEOUT_S) -> bool:
        """As `AsyncClient.release_gpu_lease`."""
        request = gpu_pb2.ReleaseGpuLeaseRequest(lease_id=lease_id)
        return self._call(self._gpu.ReleaseGpuLease, request, timeout_s).changed

    def gpu_handover(self, *, timeout_s: float = CALL_TIMEOUT_S) -> GpuHandover:
        """As `AsyncClient.gpu_handover`."""
        request = gpu_pb2.GetGpuHandoverRequest()
        return wire.handover_from_proto(self._call(self._gpu.GetGpuHandover, request, timeout_s))

    def health(self, service: str = "", *, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """As `AsyncClient.health`."""
        request = health_pb2.HealthCheckRequest(service=service)
        response = self._call(self._health.Check, request, timeout_s)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def _call(
        self,
        method: Callable[..., Response],
        request: Request,
        timeout_s: float,
        *,
        safe: bool = True,
    ) -> Response:
        attempts = Attempts.within(timeout_s, safe=safe)
        while True:
            try:
                return method(request, timeout=attempts.remaining_s, metadata=self._connection.metadata)
            except grpc.RpcError as error:
                delay = attempts.delay_after(error)
                if delay is None:
                    raise from_grpc(error) from error
            time.sleep(delay)
