"""A caller of gRPC that writes its own frames, and so can do what no client library would."""

from __future__ import annotations

import socket
import struct
from typing import Self

import hpack
from hyperframe.frame import DataFrame, Frame, HeadersFrame, SettingsFrame, WindowUpdateFrame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CHAT = "/agentloop.v1.InferenceService/Chat"
LARGEST_WINDOW = 2**31 - 1


class RawCaller:
    """One connection. It reads only when it is told to."""

    def __init__(self, address: str, *, window: int = LARGEST_WINDOW) -> None:
        """`window` is how many bytes of an answer may come unasked (SETTINGS_INITIAL_WINDOW_SIZE)."""
        host, _, port = address.rpartition(":")
        self._authority = address
        self._encoder = hpack.Encoder()
        self._next_stream = 1
        self.socket = socket.create_connection((host, int(port)), 10)
        settings = SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: window})
        update = WindowUpdateFrame(0, LARGEST_WINDOW - 65535)
        self.send(PREFACE + settings.serialize() + update.serialize())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *frames: Frame | bytes) -> None:
        """Write; raises OSError when the server has ended the connection."""
        self.socket.sendall(
            b"".join(frame if isinstance(frame, bytes) else frame.serialize() for frame in frames)
        )

    def headers(self, token: str, *, path: str = CHAT) -> HeadersFrame:
        """The beginning of the next call."""
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("authorization", f"Bearer {token}"),
        ]
        frame = HeadersFrame(self._next_stream, self._encoder.encode(fields), flags=["END_HEADERS"])
        self._next_stream += 2
        return frame

    def call(self, token: str, message: bytes) -> int:
        """Begin a call with its whole request; its stream's number."""
        begin = self.headers(token)
        body = struct.pack(">BI", 0, len(message)) + message
        self.send(begin, DataFrame(begin.stream_id, body, flags=["END_STREAM"]))
        return int(begin.stream_id)

    def ended(self, seconds: float) -> bool:
        """Whether the server closes the connection within `seconds`; what it sends before is dropped."""
        self.socket.settimeout(seconds)
        try:
            while self.socket.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            return True
        return True
