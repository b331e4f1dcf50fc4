"""A bare grpc.aio server, in a process of its own: the messages of an answer from memory, and nothing else.

No token, no log, no engine, no counting: what any server in this language, on this library, can at most do.
`python -m benchmarks.gateway.bare` prints its address, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc

from agentloop.v1 import inference_pb2 as pb

WORDS = ("The", " weather", " in", " Oslo", " is", " fine", ",", " and")


async def chat(request: pb.ChatRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Answer with as many tokens as were asked for."""
    started = pb.Started(inference_id="0" * 36, model_version="gemma-3-270m:base")
    await context.write(pb.ChatResponse(started=started))
    count = request.sampling.max_tokens
    for index in range(count):
        text = WORDS[index % len(WORDS)]
        await context.write(pb.ChatResponse(text_delta=pb.TextDelta(text=text)))
    completed = pb.Completed(
        finish_reason=pb.FINISH_REASON_LENGTH,
        usage=pb.Usage(input_tokens=7, output_tokens=count),
        timings=pb.Timings(queue_ms=0.1, time_to_first_token_ms=0.1, total_ms=0.1),
    )
    await context.write(pb.ChatResponse(completed=completed))


async def main() -> None:
    server = grpc.aio.server()
    method = grpc.unary_stream_rpc_method_handler(
        chat, pb.ChatRequest.FromString, pb.ChatResponse.SerializeToString
    )
    service = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"Chat": method})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
