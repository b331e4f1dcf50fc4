"""An HTTP server that speaks Ollama's API, in a process of its own: constant delays, or a fault by script.

What it answers with is no model's, but where and when its bytes come is all that tests of faults and the
benchmark of the gateway ask for. `with ScriptedOllama() as ollama:` and give `ollama.url` to a server;
`ollama.play(Script(…))` holds for the requests that come after it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

MODEL = "gemma-3-270m:base"
_ROOT = Path(__file__).parents[1]
_SHA256 = "ab" * 32
_WORDS = ("The", " weather", " in", " Oslo", " is", " fine", ",", " and")
_AT_ONCE = 16
"""Lines a write where no delay is asked for."""


@dataclass(frozen=True, slots=True)
class Script:
    """How a request for tokens is answered.

    `first_ms` until the first, `token_ms` between them; `fault`, a name of `_FAULTS` or `_REFUSALS`, comes
    after `after` tokens. Without one an answer has as many tokens as were asked for.
    """

    first_ms: float = 0
    token_ms: float = 0
    fault: str = ""
    after: int = 2


class ScriptedOllama:
    """The process; it ends with the block."""

    def __init__(self) -> None:
        self.url = ""
        self._port = 0
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, at the port that it had before, if it had one."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.scripted_ollama", str(self._port)],
            cwd=_ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self._port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self._port}"

    def stop(self) -> None:
        """End it."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()

    def play(self, script: Script) -> None:
        """What follows is answered by `script`."""
        self._ask("/script", asdict(script))

    def seen(self) -> dict[str, int]:
        """Requests for tokens: how many `began`, how many `left` because nobody listened any more."""
        return dict(self._ask("/seen", {}))

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as response:
            return dict(json.load(response))


class _Left(Exception):  # noqa: N818 - no error: who asked has gone
    """Nobody listens any more."""


class _Server:
    def __init__(self) -> None:
        self.script = Script()
        self.seen = {"began": 0, "left": 0}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        early = b""
        try:
            while head := early + await reader.readuntil(b"\r\n\r\n"):
                early = b""
                path = head.split(b" ", 2)[1].decode()
                body = await reader.readexactly(_length(head))
                if path == "/api/generate" and (asked := json.loads(body)).get("prompt"):
                    early = await self._generate(asked, reader, writer)
                else:
                    writer.write(_whole(200, self._answer(path, body)))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, _Left):
            pass
        finally:
            writer.close()

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/script":
            self.script = Script(**json.loads(body))
        model = {"name": MODEL, "digest": "d" * 64, "size": 1, "details": {"format": "gguf"}}
        answers: dict[str, dict[str, Any]] = {
            "/api/version": {"version": "0.34.0"},
            "/api/tags": {"models": [model]},
            "/api/ps": {"models": [model]},
            "/api/show": {"license": f"GGUF installed by agent-loop-service, sha256:{_SHA256}"},
            "/seen": self.seen,
        }
        return answers.get(path, {"done": True, "done_reason": "load"})

    async def _generate(
        self, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        """What was read of the next request, while this one was watched for its end."""
        self.seen["began"] += 1
        more = asyncio.ensure_future(reader.read(1))
        stream = asyncio.ensure_future(_stream(self.script, asked, writer))
        try:
            await asyncio.wait({more, stream}, return_when=asyncio.FIRST_COMPLETED)
            if not stream.done() and not more.result():
                self.seen["left"] += 1
                raise _Left
            await stream
        finally:
            stream.cancel()
            more.cancel()
            await asyncio.gather(stream, more, return_exceptions=True)
        return b"" if more.cancelled() else more.result()


async def _stream(script: Script, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    refusal = _REFUSALS.get(script.fault)
    if refusal is not None:
        writer.write(_whole(*refusal))
        return
    if script.first_ms:
        await asyncio.sleep(script.first_ms / 1000)
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    count = int(asked["options"]["num_predict"])
    until = min(count, script.after) if script.fault else count
    async for lines in _tokens(until, script.token_ms):
        writer.write(lines)
        await writer.drain()
    if script.fault:
        await _FAULTS[script.fault](writer)
    writer.write(_chunk(_last(count)) + b"0\r\n\r\n")


async def _tokens(count: int, token_ms: float) -> AsyncIterator[bytes]:
    """Lines of one token each, at their time: they do not drift, however long a write takes."""
    began = time.monotonic()
    at_once = 1 if token_ms else _AT_ONCE
    for index in range(0, count, at_once):
        if index and token_ms:
            await asyncio.sleep(max(0.0, began + index * token_ms / 1000 - time.monotonic()))
        yield b"".join(_LINES[which % len(_LINES)] for which in range(index, min(count, index + at_once)))


def _line(text: str) -> bytes:
    """One token as Ollama writes it."""
    event = {
        "model": MODEL,
        "created_at": "2026-11-24T08:00:00.123456789Z",
        "response": text,
        "done": False,
    }
    return _chunk(event)


def _last(count: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "response": "",
        "done": True,
        "done_reason": "length",
        "prompt_eval_count": 7,
        "eval_count": count,
    }


def _chunk(event: Any) -> bytes:
    line = event if isinstance(event, bytes) else json.dumps(event, separators=(",", ":")).encode() + b"\n"
    return f"{len(line):x}\r\n".encode() + line + b"\r\n"


def _whole(status: int, value: Any) -> bytes:
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


_LINES = tuple(_line(word) for word in _WORDS)


# Faults


async def _reset(writer: asyncio.StreamWriter) -> None:
    """As a machine that crashed and is up again, or a firewall, ends a connection: RST."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    raise _Left


async def _cut(writer: asyncio.StreamWriter) -> None:
    """The connection ends in the middle of a line."""
    writer.write(b'ff\r\n{"model":"gemma')
    await writer.drain()
    raise _Left


async def _close(writer: asyncio.StreamWriter) -> None:
    """The answer ends as HTTP wants it, without its last word."""
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    raise _Left


async def _stall(writer: asyncio.StreamWriter) -> None:
    del writer
    await asyncio.Event().wait()


async def _die(writer: asyncio.StreamWriter) -> None:
    del writer
    os._exit(9)


async def _endless_line(writer: asyncio.StreamWriter) -> None:
    """One line that never ends."""
    while True:
        writer.write(_chunk(b"x" * 65536))
        await writer.drain()


async def _never_stop(writer: asyncio.StreamWriter) -> None:
    """Tokens without end, whatever was asked for."""
    while True:
        writer.write(_LINES[0] * 64)
        await writer.drain()


def _says(event: Any) -> Any:
    """A fault that is one wrong line."""

    async def say(writer: asyncio.StreamWriter) -> None:
        writer.write(_chunk(event))
        await writer.drain()

    return say


_FAULTS = {
    "reset": _reset,
    "cut": _cut,
    "close": _close,
    "stall": _stall,
    "die": _die,
    "endless line": _endless_line,
    "endless answer": _never_stop,
    "no JSON": _says(b"<html>502 Bad Gateway</html>\n"),
    "no object": _says([1]),
    "too deep": _says(b"[" * 200_000 + b"\n"),
    "no UTF-8": _says(b'{"response":"\xff","done":false}\n'),
    "no text": _says({"response": ["x"], "done": False}),
    "half a surrogate": _says({"response": "\ud800", "done": False}),
    "no reason": _says({"done": True, "eval_count": 1}),
    "no counts": _says({**_last("many")}),
    "negative counts": _says({**_last(-1)}),
    "huge counts": _says({**_last(2**40)}),
    "infinite counts": _says(b'{"done":true,"done_reason":"stop","eval_count":1e999}\n'),
    "runner out of memory": _says(
        {"error": "an error was encountered while running the model: llama-server: signal: killed"}
    ),
}
_REFUSALS: dict[str, tuple[int, Any]] = {
    "out of memory": (
        500,
        {"error": "model requires more system memory (5.6 GiB) than is available (1.2 GiB)"},
    ),
    "busy": (503, {"error": "server busy, please try again.  maximum pending requests exceeded"}),
    "bad gateway": (502, "Bad Gateway"),
    "teapot": (418, {"no error": "here"}),
}


async def _main(port: int) -> None:
    server = await asyncio.start_server(_Server().serve, "127.0.0.1", port, limit=1 << 24, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # its end says that whoever started us is done, or dead
    os._exit(0)  # streams may be under way


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
