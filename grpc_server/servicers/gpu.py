"""GpuService: the GPU, lent to a training and taken back."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import grpc

from agentloop.v1 import gpu_pb2 as pb
from agentloop.v1 import gpu_pb2_grpc as rpc
from grpc_server.domain import rules
from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.types import HandoverState, KeptLease
from grpc_server.handover import Handover
from grpc_server.interceptors.auth import caller

HOLDER_CHARACTERS = 128
_STATES = {
    HandoverState.SERVING: pb.HANDOVER_STATE_SERVING,
    HandoverState.DRAINING: pb.HANDOVER_STATE_DRAINING,
    HandoverState.LEASED: pb.HANDOVER_STATE_LEASED,
    HandoverState.RESTORING: pb.HANDOVER_STATE_RESTORING,
}

Context = grpc.aio.ServicerContext[Any, Any]


class GpuServicer(rpc.GpuServiceServicer):
    """A `Handover` over gRPC."""

    def __init__(self, handover: Handover) -> None:
        self._handover = handover

    async def LeaseGpu(  # noqa: N802 - gRPC's name
        self, request: pb.LeaseGpuRequest, context: Context
    ) -> pb.LeaseGpuResponse:
        """Lend the GPU; returns when it is free."""
        del context
        rules.check_identifier("holder", request.holder, HOLDER_CHARACTERS)
        if not request.holder:
            raise InvalidArgument("holder is empty; say who wants the GPU", "holder")
        return pb.LeaseGpuResponse(lease=self._proto(await self._handover.give(caller(), request.holder)))

    async def RenewGpuLease(  # noqa: N802 - gRPC's name
        self, request: pb.RenewGpuLeaseRequest, context: Context
    ) -> pb.RenewGpuLeaseResponse:
        """Put the end of a lease off."""
        del context
        return pb.RenewGpuLeaseResponse(lease=self._proto(await self._handover.renew(_id(request.lease_id))))

    async def ReleaseGpuLease(  # noqa: N802 - gRPC's name
        self, request: pb.ReleaseGpuLeaseRequest, context: Context
    ) -> pb.ReleaseGpuLeaseResponse:
        """End a lease; returns when the models are back."""
        del context
        changed = await self._handover.release(caller(), _id(request.lease_id))
        return pb.ReleaseGpuLeaseResponse(changed=changed)

    async def GetGpuHandover(  # noqa: N802 - gRPC's name
        self, request: pb.GetGpuHandoverRequest, context: Context
    ) -> pb.GetGpuHandoverResponse:
        """Who has the GPU."""
        del request, context
        lease = self._handover.lease
        return pb.GetGpuHandoverResponse(
            state=_STATES[self._handover.state],
            mode=self._handover.mode.value,
            lease=None if lease is None else self._proto(lease),
        )

    def _proto(self, lease: KeptLease) -> pb.GpuLease:
        return pb.GpuLease(
            id=str(lease.id),
            holder=lease.holder,
            expires_in_seconds=lease.expires_in_seconds,
            remaining_seconds=lease.remaining_seconds,
            lease_seconds=self._handover.lease_seconds,
        )


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidArgument(
            f"lease_id has {len(text)} characters, and is no UUID; give the one that LeaseGpu gave",
            "lease_id",
        ) from None
