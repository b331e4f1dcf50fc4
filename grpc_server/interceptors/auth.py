"""Who calls, and whether the token's scopes allow it; asked before anything is generated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any

import grpc

from grpc_server.audit import Audit
from grpc_server.bearer import KEY, token_in
from grpc_server.domain.errors import PermissionDenied, Unauthenticated
from grpc_server.domain.ports import Authenticator
from grpc_server.domain.types import Caller, Scope
from grpc_server.interceptors.wrap import Call, Interceptor, wrap

OPEN: frozenset[str] = frozenset(
    {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List"}
)
"""What needs no token."""

SCOPES: Mapping[str, Scope | None] = {
    "/agentloop.v1.InferenceService/Chat": Scope.INFER,
    "/agentloop.v1.InferenceService/Generate": Scope.INFER,
    "/agentloop.v1.InferenceService/CountTokens": Scope.INFER,
    "/agentloop.v1.InferenceService/Embed": Scope.INFER,
    "/agentloop.v1.InferenceService/CancelInference": Scope.INFER,
    "/agentloop.v1.LogService/GetInference": Scope.INFER,
    "/agentloop.v1.LogService/ListInferences": Scope.INFER,
    "/agentloop.v1.FeedbackService/Submit": Scope.FEEDBACK,
    "/agentloop.v1.ModelService/ListModels": Scope.MODELS_READ,
    "/agentloop.v1.ModelService/InstallModel": Scope.MODELS_WRITE,
    "/agentloop.v1.ModelService/GetModel": Scope.MODELS_READ,
    "/agentloop.v1.ModelService/InstallModelStream": Scope.MODELS_WRITE,
    "/agentloop.v1.ModelService/LoadModel": Scope.MODELS_WRITE,
    "/agentloop.v1.ModelService/UnloadModel": Scope.MODELS_WRITE,
    "/agentloop.v1.ModelService/RemoveModel": Scope.MODELS_WRITE,
    "/agentloop.v1.ModelService/GetRoute": Scope.MODELS_READ,
    "/agentloop.v1.ModelService/SetRoute": Scope.MODELS_WRITE,
    "/agentloop.v1.GpuService/LeaseGpu": Scope.MODELS_WRITE,
    "/agentloop.v1.GpuService/RenewGpuLease": Scope.MODELS_WRITE,
    "/agentloop.v1.GpuService/ReleaseGpuLease": Scope.MODELS_WRITE,
    "/agentloop.v1.GpuService/GetGpuHandover": Scope.MODELS_READ,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": None,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": None,
}
"""The scope that each method needs; None: any valid token. What is not here is refused."""

ADMINISTRATIVE = frozenset({Scope.MODELS_WRITE, Scope.ADMIN})
"""Scopes whose use, and whose lack, is written down."""

_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Who makes the call that is being answered."""
    return _caller.get()


class AuthInterceptor(Interceptor):
    """Refuses, inside the method's handler, a call whose token is not valid or does not allow it."""

    def __init__(self, authenticator: Authenticator, audit: Audit) -> None:
        self._authenticator = authenticator
        self._audit = audit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The method's handler, inside one that asks for a token."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method in OPEN:
            return handler
        metadata = handler_call_details.invocation_metadata

        async def around(context: grpc.aio.ServicerContext[Any, Any], call: Call) -> Any:
            del context
            _caller.set(await self._admit(method, metadata))
            return await call()

        return wrap(handler, around)

    async def _admit(self, method: str, metadata: Any) -> Caller:
        token = token_in([value for key, value in metadata or () if key == KEY])
        if not token:
            raise Unauthenticated
        who = await self._authenticator.authenticate(token)
        if method not in SCOPES:
            raise PermissionDenied("no token allows this method")
        scope = SCOPES[method]
        if scope is not None and not who.may(scope):
            if scope in ADMINISTRATIVE:
                self._audit.denied(who, method)
            raise PermissionDenied(f"this call needs the scope {scope}")
        return who
