"""A small server on the real gRPC that answers what a test scripts, and keeps what it was asked."""

# ruff: noqa: N802 (gRPC names its methods so)
from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agentloop.v1 import (
    feedback_pb2,
    feedback_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

Step = inference_pb2.ChatResponse | grpc.StatusCode | threading.Event


def started(inference_id: str = "i-1", model_version: str = "m:1") -> inference_pb2.ChatResponse:
    return inference_pb2.ChatResponse(
        started=inference_pb2.Started(inference_id=inference_id, model_version=model_version)
    )


def text(piece: str) -> inference_pb2.ChatResponse:
    return inference_pb2.ChatResponse(text_delta=inference_pb2.TextDelta(text=piece))


def tool_call(name: str, arguments_json: str) -> inference_pb2.ChatResponse:
    return inference_pb2.ChatResponse(
        tool_call=inference_pb2.ToolCall(name=name, arguments_json=arguments_json)
    )


def completed() -> inference_pb2.ChatResponse:
    return inference_pb2.ChatResponse(
        completed=inference_pb2.Completed(
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            usage=inference_pb2.Usage(input_tokens=3, output_tokens=2),
            timings=inference_pb2.Timings(queue_ms=1, time_to_first_token_ms=20, total_ms=30),
        )
    )


@dataclass
class ScriptedService(
    inference_pb2_grpc.InferenceServiceServicer,
    feedback_pb2_grpc.FeedbackServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    health_pb2_grpc.HealthServicer,  # type: ignore[misc]  # it has no types
):
    """Chat plays the next of `chats`, or says "ok"; `refusals` are the statuses of the next other calls."""

    chats: list[list[Step]] = field(default_factory=list)
    refusals: list[grpc.StatusCode] = field(default_factory=list)
    routes: dict[str, model_pb2.Route] = field(default_factory=dict)
    installed: dict[str, model_pb2.ModelVersion] = field(default_factory=dict)
    serving: bool = True
    breaks_off: bool = False
    asked: list[object] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def _note(self, request: object, context: grpc.ServicerContext) -> None:
        self.asked.append(request)
        self.tokens.append(str(dict(context.invocation_metadata()).get("authorization", "")))
        remaining = context.time_remaining()
        self.deadlines.append(-1.0 if remaining is None else remaining)
        if self.refusals and not isinstance(request, inference_pb2.ChatRequest):
            context.abort(self.refusals.pop(0), "not now")

    def Chat(
        self, request: inference_pb2.ChatRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.ChatResponse]:
        self._note(request, context)
        context.add_callback(self.cancelled.set)
        for step in self.chats.pop(0) if self.chats else [started(), text("ok"), completed()]:
            if isinstance(step, grpc.StatusCode):
                context.abort(step, "as scripted")
            elif isinstance(step, threading.Event):
                step.wait(10)
            else:
                yield step

    def Submit(
        self, request: feedback_pb2.SubmitRequest, context: grpc.ServicerContext
    ) -> feedback_pb2.SubmitResponse:
        self._note(request, context)
        return feedback_pb2.SubmitResponse(feedback_id=request.feedback_id)

    def ListModels(
        self, request: model_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_pb2.ListModelsResponse:
        self._note(request, context)
        return model_pb2.ListModelsResponse(models=self.installed.values())

    def InstallModel(
        self, request: model_pb2.InstallModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.InstallModelResponse:
        self._note(request, context)
        changed = request.name not in self.installed
        model = model_pb2.ModelVersion(name=request.name, sha256=request.sha256, size_bytes=253_000_000)
        return model_pb2.InstallModelResponse(
            model=self.installed.setdefault(request.name, model), changed=changed
        )

    def InstallModelStream(
        self, request: model_pb2.InstallModelStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[model_pb2.InstallModelStreamResponse]:
        copying = model_pb2.InstallProgress(
            phase=model_pb2.INSTALL_PHASE_COPYING, done_bytes=50, total_bytes=100, host=2, hosts=3
        )
        installed = self.InstallModel(request.install, context)
        yield model_pb2.InstallModelStreamResponse(progress=copying)
        if not self.breaks_off:
            yield model_pb2.InstallModelStreamResponse(installed=installed)

    def GetModel(
        self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.GetModelResponse:
        self._note(request, context)
        if request.name not in self.installed:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model version {request.name} is installed")
        details = model_pb2.ModelDetails(
            architecture="gemma3", parameters=268_098_176, quantization="Q4_K_M", context_tokens=32_768
        )
        return model_pb2.GetModelResponse(
            model=self.installed[request.name],
            details=details,
            cycle_id="1",
            base="m:base",
            aliases=["default"],
        )

    def LoadModel(
        self, request: model_pb2.LoadModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.LoadModelResponse:
        self._note(request, context)
        model = self.installed[request.name]
        changed, model.loaded = not model.loaded, True
        return model_pb2.LoadModelResponse(model=model, changed=changed)

    def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.UnloadModelResponse:
        self._note(request, context)
        if not request.force:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "route default leads to it")
        model = self.installed[request.name]
        changed, model.loaded = model.loaded, False
        return model_pb2.UnloadModelResponse(model=model, changed=changed)

    def RemoveModel(
        self, request: model_pb2.RemoveModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.RemoveModelResponse:
        self._note(request, context)
        return model_pb2.RemoveModelResponse(changed=self.installed.pop(request.name, None) is not None)

    def GetRoute(
        self, request: model_pb2.GetRouteRequest, context: grpc.ServicerContext
    ) -> model_pb2.GetRouteResponse:
        self._note(request, context)
        alias = request.alias or "default"
        if alias not in self.routes:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no alias {alias}")
        return model_pb2.GetRouteResponse(route=self.routes[alias])

    def SetRoute(
        self, request: model_pb2.SetRouteRequest, context: grpc.ServicerContext
    ) -> model_pb2.SetRouteResponse:
        self._note(request, context)
        now = self.routes.get(request.route.alias, model_pb2.Route())
        if request.route.revision != now.revision:
            context.abort(grpc.StatusCode.ABORTED, f"the revision is {now.revision}")
        request.route.revision += 1
        self.routes[request.route.alias] = request.route
        return model_pb2.SetRouteResponse(route=request.route)

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        self._note(request, context)
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if self.serving else status.NOT_SERVING)


@contextmanager
def running(service: ScriptedService, port: int = 0) -> Iterator[ScriptedService]:
    """The service, on a free port of this host, until the end of the block."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(service, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield service
    finally:
        server.stop(None).wait()
