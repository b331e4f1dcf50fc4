"""A bare grpc.aio server, in a process of its own: the messages of an answer from memory, and nothing else.

No token, no log, no engine, no counting: what any server in this language, on this library, can at most do.
`python -m benchmarks.gateway.bare [MS]` prints its address, and ends when its standard input does. With MS it
waits so long between two tokens of a stream.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import grpc

from agentloop.v1 import inference_pb2 as pb

PACE = float(sys.argv[1]) / 1000 if len(sys.argv) > 1 else 0.0
WORDS = ("The", " weather", " in", " Oslo", " is", " fine", ",", " and")


async def chat(request: pb.ChatRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Answer with as many tokens as were asked for."""
    started = pb.Started(inference_id="0" * 36, model_version="gemma-3-270m:base")
    await context.write(pb.ChatResponse(started=started))
    count = request.sampling.max_tokens
    began = time.monotonic()
    for index in range(count):
        if index and PACE:
            await asyncio.sleep(max(0.0, began + index * PACE - time.monotonic()))
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
