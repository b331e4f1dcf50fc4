"""The asynchronous client.

    async with AsyncClient("127.0.0.1:50051", token="al_…") as client:
        async for event in client.chat("What is the weather in Oslo?", tools=[weather]):
            ...

Every call has a deadline. A call that found no server is tried again where a second try can do no harm:
reads, installing (the name and the bytes say what is meant), feedback (its id is drawn here), and a chat of
which no event has arrived yet.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agentloop import log_wire, wire
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

CHAT_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 30.0
INSTALL_TIMEOUT_S = 1800.0
LEASE_TIMEOUT_S = 600.0


class AsyncClient:
    """Calls the service. Use it as an async context manager, or `await close()` when done."""

    def __init__(
        self,
        server: str | None = None,
        token: str | None = None,
        *,
        token_file: str | Path | None = None,
        ca_file: str | Path | None = None,
        priority: Priority | None = None,
    ) -> None:
        """Connect lazily; what is None is read from the environment (see `connection`).

        Raises:
            ConfigurationError: if the address, the token or a file is wrong.
        """
        self._connection = connection(server, token, token_file, ca_file, priority)
        self._channel = self._connection.open_async()
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._log = log_pb2_grpc.LogServiceStub(self._channel)
        self._feedback = feedback_pb2_grpc.FeedbackServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._gpu = gpu_pb2_grpc.GpuServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        await self._channel.close(None)

    async def chat(
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
    ) -> AsyncGenerator[ChatEvent, None]:
        """Stream one answer: Started, then TextDelta and ToolCall, then Completed.

        Closing the generator cancels the call, and the server stops generating.

        Raises:
            RpcError: the status, with the inference's id once Started has arrived.
            IncompleteStream: if the stream ends without Completed.
        """
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
        async with aclosing(self._events(self._inference.Chat, request, timeout_s)) as events:
            async for event in events:
                yield event

    async def generate(
        self,
        prompt: str,
        *,
        sampling: Sampling | None = None,
        json_schema: JsonObject | None = None,
        alias: str = "",
        model_version: str = "",
        session_id: str = "",
        timeout_s: float = CHAT_TIMEOUT_S,
    ) -> AsyncGenerator[ChatEvent, None]:
        """Stream the continuation of a raw prompt: Started, TextDelta, Completed. As `chat` otherwise."""
        request = wire.generate_request(
            prompt,
            sampling=sampling or Sampling(),
            json_schema=json_schema,
            alias=alias,
            model_version=model_version,
            session_id=session_id,
        )
        async with aclosing(self._events(self._inference.Generate, request, timeout_s)) as events:
            async for event in events:
                yield event

    async def _events(
        self,
        method: Callable[..., Any],
        request: inference_pb2.ChatRequest | inference_pb2.GenerateRequest,
        timeout_s: float,
    ) -> AsyncGenerator[ChatEvent, None]:
        attempts = Attempts.within(timeout_s)
        while True:
            try:
                async with aclosing(self._stream(method, request, attempts)) as events:
                    async for event in events:
                        yield event
                return
            except grpc.aio.AioRpcError as error:
                delay = attempts.delay_after(error)
                if delay is None:
                    raise from_grpc(error) from error
            await asyncio.sleep(delay)

    async def _stream(
        self,
        method: Callable[..., Any],
        request: inference_pb2.ChatRequest | inference_pb2.GenerateRequest,
        attempts: Attempts,
    ) -> AsyncGenerator[ChatEvent, None]:
        """One try. Raises AioRpcError only before its first event: after it, the error is final."""
        call = method(request, timeout=attempts.remaining_s, metadata=self._connection.metadata)
        inference_id = ""
        begun = completed = False
        try:
            async for response in call:
                begun = True
                event = wire.event_from_proto(response)
                if isinstance(event, Started):
                    inference_id = event.inference_id
                completed = completed or isinstance(event, Completed)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            if begun:
                raise from_grpc(error, inference_id) from error
            raise
        finally:
            call.cancel()
        if not completed:
            raise IncompleteStream(f"the stream of inference {inference_id!r} ended without its last event")

    async def ask(self, messages: str | Sequence[Message], **options: Any) -> Answer:
        """The whole answer; options and errors are those of `chat`."""
        async with aclosing(self.chat(messages, **options)) as events:
            return wire.collect([event async for event in events])

    async def count_tokens(
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
        """What `chat` would read of the same arguments, counted by the model version that would answer."""
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
        response = await self._call(self._inference.CountTokens, request, timeout_s)
        return TokenCount(response.input_tokens, response.model_version)

    async def count_prompt_tokens(
        self, prompt: str, *, alias: str = "", model_version: str = "", timeout_s: float = CALL_TIMEOUT_S
    ) -> TokenCount:
        """What `generate` would read of a raw prompt."""
        generate = wire.generate_request(
            prompt,
            sampling=Sampling(),
            json_schema=None,
            alias=alias,
            model_version=model_version,
            session_id="",
        )
        request = inference_pb2.CountTokensRequest(generate=generate)
        response = await self._call(self._inference.CountTokens, request, timeout_s)
        return TokenCount(response.input_tokens, response.model_version)

    async def embed(
        self,
        texts: Sequence[str],
        *,
        alias: str = "",
        model_version: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Embeddings:
        """One vector a text, all by the alias's stable model version.

        Raises FailedPrecondition where the engine makes none with it.
        """
        request = wire.embed_request(texts, alias, model_version)
        return wire.embeddings_from_proto(await self._call(self._inference.Embed, request, timeout_s))

    async def cancel(self, inference_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """End a running inference of one's own, on whichever server it runs.

        Raises NotFound if it has ended, or is another caller's; Unavailable if the server that is asked does
        not run it, and those that share its log could not be asked.
        """
        request = inference_pb2.CancelInferenceRequest(inference_id=inference_id)
        await self._call(self._inference.CancelInference, request, timeout_s, safe=False)

    async def get_inference(self, inference_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Inference:
        """One's own inference, whole, with its feedback. Raises NotFound, also in its first moment."""
        request = log_pb2.GetInferenceRequest(inference_id=inference_id)
        response = await self._call(self._log.GetInference, request, timeout_s)
        return log_wire.inference_from_proto(response.inference)

    async def list_inferences(
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
        """A page of one's own inferences without their texts, the newest first; `caller` needs admin."""
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
        response = await self._call(self._log.ListInferences, request, timeout_s)
        return log_wire.page_from_proto(response)

    async def inferences(self, **wanted: Any) -> AsyncGenerator[Inference, None]:
        """Every inference that `list_inferences` would show, page by page."""
        token = ""
        while True:
            page = await self.list_inferences(**wanted, page_token=token)
            for inference in page.inferences:
                yield inference
            token = page.next_page_token
            if not token:
                return

    async def submit_feedback(
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
        """Send one feedback and return its id; on return it is on the server's disk."""
        request = wire.feedback_request(
            inference_id,
            feedback_id or str(uuid.uuid4()),
            boolean=boolean,
            score=score,
            comment=comment,
            demonstration=demonstration,
        )
        return (await self._call(self._feedback.Submit, request, timeout_s)).feedback_id

    async def list_models(self, *, timeout_s: float = CALL_TIMEOUT_S) -> list[ModelVersion]:
        """The installed model versions, by name."""
        response = await self._call(self._models.ListModels, model_pb2.ListModelsRequest(), timeout_s)
        return [wire.model_from_proto(model) for model in response.models]

    async def get_model(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> ModelDetails:
        """All that is known of an installed version. Raises NotFound."""
        request = model_pb2.GetModelRequest(name=name)
        return wire.details_from_proto(await self._call(self._models.GetModel, request, timeout_s))

    async def install_model(
        self,
        name: str,
        path: str | Path,
        sha256: str,
        *,
        on_progress: Callable[[InstallProgress], None] | None = None,
        timeout_s: float = INSTALL_TIMEOUT_S,
    ) -> tuple[ModelVersion, bool]:
        """Install a GGUF that lies on the server's host; the version, and whether anything changed.

        `on_progress` is called about twice a second.
        """
        request = model_pb2.InstallModelRequest(name=name, path=str(path), sha256=sha256)

        async def tell(install: model_pb2.InstallModelRequest, **options: Any) -> Any:
            stream = model_pb2.InstallModelStreamRequest(install=install)
            async for response in self._models.InstallModelStream(stream, **options):
                if response.WhichOneof("event") == "installed":
                    return response.installed
                if on_progress is not None:
                    on_progress(wire.progress_from_proto(response.progress))
            raise IncompleteStream(f"the installation of {name} ended without a result; install it again")

        method = self._models.InstallModel if on_progress is None else tell
        response = await self._call(method, request, timeout_s)
        return wire.model_from_proto(response.model), response.changed

    async def load_model(
        self, name: str, *, timeout_s: float = INSTALL_TIMEOUT_S
    ) -> tuple[ModelVersion, bool]:
        """Bring a version into the engine's memory; the version, and whether it was not there already."""
        request = model_pb2.LoadModelRequest(name=name)
        response = await self._call(self._models.LoadModel, request, timeout_s)
        return wire.model_from_proto(response.model), response.changed

    async def unload_model(
        self, name: str, *, force: bool = False, timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[ModelVersion, bool]:
        """Free a version's memory, with `force` although a route leads to it; and whether it was there."""
        request = model_pb2.UnloadModelRequest(name=name, force=force)
        response = await self._call(self._models.UnloadModel, request, timeout_s, safe=False)
        return wire.model_from_proto(response.model), response.changed

    async def remove_model(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Delete a model version that no route names; whether there was one."""
        request = model_pb2.RemoveModelRequest(name=name)
        return (await self._call(self._models.RemoveModel, request, timeout_s, safe=False)).changed

    async def get_route(self, alias: str = "", *, timeout_s: float = CALL_TIMEOUT_S) -> Route:
        """The route in force; of the alias `default` if none is named."""
        request = model_pb2.GetRouteRequest(alias=alias)
        return wire.route_from_proto((await self._call(self._models.GetRoute, request, timeout_s)).route)

    async def set_route(
        self, alias: str, targets: Sequence[Target], revision: int, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Route:
        """Replace the route of that revision. Raises Conflict if it has moved on meanwhile."""
        request = model_pb2.SetRouteRequest(route=wire.route_to_proto(alias, targets, revision))
        response = await self._call(self._models.SetRoute, request, timeout_s, safe=False)
        return wire.route_from_proto(response.route)

    async def lease_gpu(self, holder: str, *, timeout_s: float = LEASE_TIMEOUT_S) -> GpuLease:
        """Take the server's GPU, once serving has left it. Raises ResourceExhausted: somebody has it."""
        request = gpu_pb2.LeaseGpuRequest(holder=holder)
        return wire.lease_from_proto(
            (await self._call(self._gpu.LeaseGpu, request, timeout_s, safe=False)).lease
        )

    async def renew_gpu_lease(self, lease_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> GpuLease:
        """Put the end of a lease off. Raises NotFound: it is over, and the GPU is not ours any more."""
        request = gpu_pb2.RenewGpuLeaseRequest(lease_id=lease_id)
        return wire.lease_from_proto((await self._call(self._gpu.RenewGpuLease, request, timeout_s)).lease)

    async def release_gpu_lease(self, lease_id: str, *, timeout_s: float = LEASE_TIMEOUT_S) -> bool:
        """End a lease, and wait until the models are back; False if it was over already."""
        request = gpu_pb2.ReleaseGpuLeaseRequest(lease_id=lease_id)
        return (await self._call(self._gpu.ReleaseGpuLease, request, timeout_s)).changed

    async def gpu_handover(self, *, timeout_s: float = CALL_TIMEOUT_S) -> GpuHandover:
        """Who has the server's GPU."""
        request = gpu_pb2.GetGpuHandoverRequest()
        return wire.handover_from_proto(await self._call(self._gpu.GetGpuHandover, request, timeout_s))

    async def health(self, service: str = "", *, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """`SERVING`, `NOT_SERVING` … by grpc.health.v1; needs no token. Raises NotFound: no such service."""
        request = health_pb2.HealthCheckRequest(service=service)
        response = await self._call(self._health.Check, request, timeout_s)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def _call(
        self,
        method: Callable[..., Awaitable[Response]],
        request: Request,
        timeout_s: float,
        *,
        safe: bool = True,
    ) -> Response:
        attempts = Attempts.within(timeout_s, safe=safe)
        while True:
            try:
                return await method(request, timeout=attempts.remaining_s, metadata=self._connection.metadata)
            except grpc.aio.AioRpcError as error:
                delay = attempts.delay_after(error)
                if delay is None:
                    raise from_grpc(error) from error
            await asyncio.sleep(delay)
