"""Typed client and command line of the agent-loop service.

    from agentloop import Client

    with Client("127.0.0.1:50051", token="al_…") as client:
        answer = client.ask("Good morning")
        client.submit_feedback(answer.inference_id, boolean=True)

`AsyncClient` is the same for asyncio; `agentloop.errors` draws what both raise; `agentloop.v1` holds the
generated messages and stubs.
"""

from agentloop.client import AsyncClient
from agentloop.errors import AgentLoopError, RpcError
from agentloop.log_types import Feedback, Inference, InferencePage
from agentloop.sync_client import Client
from agentloop.types import (
    Answer,
    ChatEvent,
    Completed,
    Embeddings,
    GpuHandover,
    GpuLease,
    InstallProgress,
    Message,
    ModelDetails,
    ModelVersion,
    Route,
    Sampling,
    Started,
    Target,
    TextDelta,
    TokenCount,
    Tool,
    ToolCall,
)

__all__ = [
    "AgentLoopError",
    "Answer",
    "AsyncClient",
    "ChatEvent",
    "Client",
    "Completed",
    "Embeddings",
    "Feedback",
    "GpuHandover",
    "GpuLease",
    "Inference",
    "InferencePage",
    "InstallProgress",
    "Message",
    "ModelDetails",
    "ModelVersion",
    "Route",
    "RpcError",
    "Sampling",
    "Started",
    "Target",
    "TextDelta",
    "TokenCount",
    "Tool",
    "ToolCall",
]
