"""Where the server is, and who asks.

| address                                       | is                                        |
|-----------------------------------------------|-------------------------------------------|
| `127.0.0.1:50051`, `localhost:…`, `unix:/path` | plaintext: it does not leave the host     |
| `models.example.org:50051`                    | TLS                                       |
| `grpcs://host:port`                           | TLS                                       |
| `grpc://host:port`                            | plaintext, because it says so             |

What is not given is read from AGENTLOOP_SERVER, AGENTLOOP_TOKEN, AGENTLOOP_TOKEN_FILE, AGENTLOOP_CA_FILE,
AGENTLOOP_PRIORITY.
A token's file is read again when it has changed, so that a token can be replaced under a running program.
A server that asks for a caller's certificate gets AGENTLOOP_CLIENT_CERT_FILE, with AGENTLOOP_CLIENT_KEY_FILE.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import grpc
import grpc.aio

from agentloop.errors import ConfigurationError

try:  # at once: an import within a call could meet an installation half-way
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # it is not among what the client needs
    _W3C = None
else:
    _W3C = TraceContextTextMapPropagator()

Priority = Literal["interactive", "batch"]
DEFAULT_SERVER = "127.0.0.1:50051"
_LOOPBACK = re.compile(r"(?:127(?:\.\d+){3}|localhost|\[::1\])(?::\d+)?|unix(?:-abstract)?:.+", re.IGNORECASE)
_OPTIONS = (
    # A snapshot of schemas and messages may pass gRPC's 4 MiB; the server has the last word on sizes.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    # A proxy named in the environment is for the web, not for the service next door.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class Connection:
    """An address, whether to speak TLS there, and the token to show."""

    target: str
    tls: bool
    token_source: Callable[[], str] = field(repr=False, default=str)
    ca_pem: bytes | None = field(repr=False, default=None)
    key_pem: bytes | None = field(repr=False, default=None)
    certificate_pem: bytes | None = field(repr=False, default=None)
    priority: Priority = "interactive"

    @property
    def token(self) -> str:
        """The token to show now."""
        return self.token_source()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries: the token, that it may wait, and the trace of its caller."""
        token = self.token
        shown = (("authorization", f"Bearer {token}"),) if token else ()
        urgency = (("x-agentloop-priority", "batch"),) if self.priority == "batch" else ()
        return shown + urgency + _trace()

    def open(self) -> grpc.Channel:
        """A channel for `Client`."""
        if self.tls:
            return grpc.secure_channel(self.target, self._tls(), _OPTIONS)
        return grpc.insecure_channel(self.target, _OPTIONS)

    def open_async(self) -> grpc.aio.Channel:
        """A channel for `AsyncClient`."""
        if self.tls:
            return grpc.aio.secure_channel(self.target, self._tls(), _OPTIONS)
        return grpc.aio.insecure_channel(self.target, _OPTIONS)

    def _tls(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca_pem, self.key_pem, self.certificate_pem)


def _trace() -> tuple[tuple[str, str], ...]:
    """`traceparent` (W3C Trace Context) of the current span, if OpenTelemetry is installed and one runs."""
    if _W3C is None:
        return ()
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return (("traceparent", carrier["traceparent"]),) if "traceparent" in carrier else ()


def connection(
    server: str | None = None,
    token: str | None = None,
    token_file: str | Path | None = None,
    ca_file: str | Path | None = None,
    priority: Priority | None = None,
) -> Connection:
    """The connection that the arguments, and for what is None the environment, describe.

    `priority` is how urgent its calls are: `interactive` where somebody waits for the answer, else `batch`.

    Raises:
        ConfigurationError: for an empty address, an unreadable file, a token that no header can carry, or a
            priority that is none.
    """
    priority = _priority(priority or os.environ.get("AGENTLOOP_PRIORITY") or "interactive")
    address = server or os.environ.get("AGENTLOOP_SERVER") or DEFAULT_SERVER
    ca_file = ca_file or os.environ.get("AGENTLOOP_CA_FILE")
    scheme, separator, rest = address.partition("://")
    if not separator:
        scheme, rest = "", address
    if scheme not in ("", "grpc", "grpcs") or not rest or rest != rest.strip():
        raise ConfigurationError(
            f"server is {address!r}; it must be host:port, grpc://host:port or grpcs://…"
        )
    tls = scheme == "grpcs" or (scheme == "" and not _LOOPBACK.fullmatch(rest))
    ca_pem = _read(ca_file, "CA file") if ca_file else None
    return Connection(rest, tls, _token(token, token_file), ca_pem, *_identity(), priority)


def _identity() -> tuple[bytes | None, bytes | None]:
    """The key and the certificate of a caller whose server asks for one; none: None."""
    key, certificate = (os.environ.get(f"AGENTLOOP_CLIENT_{name}_FILE") for name in ("KEY", "CERT"))
    if not key and not certificate:
        return None, None
    if not key or not certificate:
        raise ConfigurationError("AGENTLOOP_CLIENT_CERT_FILE and AGENTLOOP_CLIENT_KEY_FILE need each other")
    return _read(key, "client's key"), _read(certificate, "client's certificate")


def _priority(value: str) -> Priority:
    for priority in get_args(Priority):
        if value == priority:
            return cast("Priority", priority)
    raise ConfigurationError(f"priority is {value!r}; it must be interactive or batch")


class TokenFile:
    """A token in a file, read again when the file has changed."""

    def __init__(self, path: str | Path) -> None:
        """Read it. Raises ConfigurationError if it cannot be read, or holds no token."""
        self._path = Path(path).expanduser()
        self._seen = self._stamp()
        self._token = self._read()

    def __call__(self) -> str:
        """The token as it is now; the one before while the file is away, empty or broken."""
        stamp = self._stamp()
        if stamp != self._seen:
            with contextlib.suppress(ConfigurationError):
                self._token = self._read() or self._token
            self._seen = stamp
        return self._token

    def _read(self) -> str:
        return _sound(_read(self._path, "token file").decode(errors="replace"))

    def _stamp(self) -> tuple[int, ...]:
        """What changes when the file is written, or another is moved to its place."""
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns


def _token(token: str | None, token_file: str | Path | None) -> Callable[[], str]:
    """The first there is of: the argument, the file named, the environment's token, its file."""
    if token is None and token_file is None:
        token = os.environ.get("AGENTLOOP_TOKEN") or None
    if token is None:
        token_file = token_file or os.environ.get("AGENTLOOP_TOKEN_FILE")
        if token_file:
            return TokenFile(token_file)
    fixed = _sound(token or "")
    return lambda: fixed


def _sound(token: str) -> str:
    token = token.strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise ConfigurationError("the token holds blanks or characters that are not ASCII; it is `al_…`")
    return token


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigurationError(f"the {what} {path} cannot be read: {error.strerror}") from error
