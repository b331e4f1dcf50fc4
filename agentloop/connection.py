"""Where the server is, and who asks.

| address                                       | is                                        |
|-----------------------------------------------|-------------------------------------------|
| `127.0.0.1:50051`, `localhost:…`, `unix:/path` | plaintext: it does not leave the host     |
| `models.example.org:50051`                    | TLS                                       |
| `grpcs://host:port`                           | TLS                                       |
| `grpc://host:port`                            | plaintext, because it says so             |

What is not given is read from AGENTLOOP_SERVER, AGENTLOOP_TOKEN, AGENTLOOP_TOKEN_FILE, AGENTLOOP_CA_FILE.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from agentloop.errors import ConfigurationError

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
    token: str = field(repr=False, default="")
    ca_pem: bytes | None = field(repr=False, default=None)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def open(self) -> grpc.Channel:
        """A channel for `Client`."""
        if self.tls:
            return grpc.secure_channel(self.target, grpc.ssl_channel_credentials(self.ca_pem), _OPTIONS)
        return grpc.insecure_channel(self.target, _OPTIONS)

    def open_async(self) -> grpc.aio.Channel:
        """A channel for `AsyncClient`."""
        if self.tls:
            return grpc.aio.secure_channel(self.target, grpc.ssl_channel_credentials(self.ca_pem), _OPTIONS)
        return grpc.aio.insecure_channel(self.target, _OPTIONS)


def connection(
    server: str | None = None,
    token: str | None = None,
    token_file: str | Path | None = None,
    ca_file: str | Path | None = None,
) -> Connection:
    """The connection that the arguments, and for what is None the environment, describe.

    Raises:
        ConfigurationError: for an empty address, an unreadable file, or a token that no header can carry.
    """
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
    return Connection(rest, tls, _token(token, token_file), _read(ca_file, "CA file") if ca_file else None)


def _token(token: str | None, token_file: str | Path | None) -> str:
    """The first there is of: the argument, the file named, the environment's token, its file."""
    if token is None and token_file is None:
        token = os.environ.get("AGENTLOOP_TOKEN") or None
    if token is None:
        token_file = token_file or os.environ.get("AGENTLOOP_TOKEN_FILE")
        token = _read(token_file, "token file").decode(errors="replace") if token_file else ""
    token = token.strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise ConfigurationError("the token holds blanks or characters that are not ASCII; it is `al_…`")
    return token


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigurationError(f"the {what} {path} cannot be read: {error.strerror}") from error
