"""Counts the messages of many streams, at a cost far below that of sending them, in a process of its own.

A client of grpc.aio does work of the server's own order a message: it would bound what is measured. This one
reads frames, walks through the length of each message, and drops them.
"""

from __future__ import annotations

import json
import selectors
import struct
import sys
import time
from dataclasses import dataclass, field

import hpack
from hyperframe.frame import PingFrame, SettingsFrame, WindowUpdateFrame

from agentloop.v1 import inference_pb2 as pb
from tests.integration.raw_http2 import LARGEST_WINDOW, RawCaller

_HEADER = struct.Struct(">HBBBI")
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_END_STREAM, _ACK = 1, 1
_READ = 1 << 18


@dataclass(slots=True)
class _Stream:
    """Where in its messages a stream is: bytes of the current one still to come, or of its header so far."""

    left: int = 0
    head: bytes = b""


@dataclass
class _Connection:
    """Streams on one connection, a new one in the place of each that ended."""

    address: str
    token: str
    request: bytes
    streams: int
    messages: int = 0
    answers: int = 0
    asking: bool = True
    _open: dict[int, _Stream] = field(default_factory=dict)
    _rest: bytes = b""
    _unconfirmed: int = 0

    def __post_init__(self) -> None:
        self.caller = RawCaller(self.address)
        self._decoder = hpack.Decoder()
        for _ in range(self.streams):
            self._ask()

    @property
    def idle(self) -> bool:
        return not self._open

    def _ask(self) -> None:
        self._open[self.caller.call(self.token, self.request)] = _Stream()

    def read(self) -> None:
        data = self.caller.socket.recv(_READ)
        if not data:
            raise ConnectionError("the server ended the connection")
        data = self._rest + data
        at, end = 0, len(data)
        while end - at >= 9:
            high, low, kind, flags, stream = _HEADER.unpack_from(data, at)
            size = (high << 8) | low
            if end - at - 9 < size:
                break
            at += 9
            if kind == _DATA:
                self._data(self._open[stream], data, at, at + size)
                self._unconfirmed += size
            else:
                self._other(kind, flags, stream, data[at : at + size])
            at += size
        self._rest = data[at:]
        if self._unconfirmed > LARGEST_WINDOW // 4:
            self.caller.send(WindowUpdateFrame(0, self._unconfirmed))
            self._unconfirmed = 0

    def _data(self, stream: _Stream, data: bytes, at: int, end: int) -> None:
        while at < end:
            if stream.left:
                step = min(stream.left, end - at)
                stream.left -= step
                at += step
                continue
            step = min(5 - len(stream.head), end - at)
            stream.head += data[at : at + step]
            at += step
            if len(stream.head) == 5:
                stream.left = int.from_bytes(stream.head[1:], "big")
                stream.head = b""
                self.messages += 1

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _HEADERS:
            fields = {str(name): str(value) for name, value in self._decoder.decode(payload)}
            if flags & _END_STREAM:
                if fields.get("grpc-status") != "0":
                    raise RuntimeError(f"a stream ended with {fields}")
                del self._open[stream]
                self.answers += 1
                if self.asking:
                    self._ask()
        elif kind == _PING and not flags & _ACK:
            self.caller.send(PingFrame(0, payload, flags=["ACK"]))
        elif kind == _SETTINGS and not flags & _ACK:
            self.caller.send(SettingsFrame(0, flags=["ACK"]))
        elif kind in (_RESET, _GOAWAY):
            raise ConnectionError(f"the server sent frame {kind}: {payload!r}")


def count(
    address: str, token: str, *, streams: int, connections: int, tokens: int, seconds: float, answers: int
) -> dict[str, float]:
    """Ask until `seconds` are over and `answers` have come; then let what runs end.

    Returns messages, answers, and the seconds from the first request to the last message.
    """
    message = pb.Message(role=pb.ROLE_USER, content="What is the weather in Oslo?")
    request = pb.ChatRequest(messages=[message], sampling=pb.SamplingOptions(max_tokens=tokens))
    began = time.perf_counter()
    opened = [
        _Connection(address, token, request.SerializeToString(), streams // connections)
        for _ in range(connections)
    ]
    with selectors.DefaultSelector() as selector:
        for connection in opened:
            selector.register(connection.caller.socket, selectors.EVENT_READ, connection)
        while not all(connection.idle for connection in opened):
            for key, _ in selector.select(60):
                key.data.read()
            if (
                sum(connection.answers for connection in opened) >= answers
                and time.perf_counter() - began >= seconds
            ):
                for connection in opened:
                    connection.asking = False
    lasted = time.perf_counter() - began
    for connection in opened:
        connection.caller.socket.close()
    messages = sum(connection.messages for connection in opened)
    return {
        "messages": messages,
        "answers": sum(connection.answers for connection in opened),
        "seconds": lasted,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(count(**json.loads(line))), flush=True)
