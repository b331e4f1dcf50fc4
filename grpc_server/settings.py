"""What can be set, and what each value must be. Where values come from: `settings_sources`."""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from grpc_server.domain.errors import InvalidArgument
from grpc_server.domain.rules import check_alias
from grpc_server.domain.types import HandoverMode
from grpc_server.settings_sources import PREFIX, SecretFiles, YamlFile

_URL = re.compile(r"(https?://)?[A-Za-z0-9_.-]+(:\d{1,5})?/?|(https?://)?\[[0-9a-fA-F:.]+\](:\d{1,5})?/?")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` (IPv6: `[::1]:50051`).

    Raises:
        ValueError: if it is not one.
    """
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not an address; write host:port, as in 127.0.0.1:50051")
    return host, int(port)


def alias_names(text: str) -> frozenset[str]:
    """The aliases of `default,agent`.

    Raises:
        ValueError: if one is none, or there is none at all.
    """
    names = frozenset(name.strip() for name in text.split(","))
    for name in names:
        try:
            check_alias(name)
        except InvalidArgument as error:
            raise ValueError(str(error)) from error
    return names


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `host:port`."""
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(value: str) -> str:
    split_address(value)
    return value


def _place(value: Path) -> Path:
    return value.expanduser().absolute()


def _keys_place(value: str) -> str:
    """A path, an https URL, or an http URL of this machine."""
    if "://" not in value:
        return value
    url = urlsplit(value)
    port = f"[{url.hostname}]:80" if url.hostname else ""
    if url.hostname and (url.scheme == "https" or (url.scheme == "http" and is_loopback(port))):
        return value
    raise ValueError(
        f"{value!r} is no place of keys; write a path, an https URL, or an http URL of this machine"
    )


def _alias_names(value: str) -> str:
    if value:
        alias_names(value)
    return value


def _ollamas(value: str) -> str:
    for url in (urls := ollama_urls(value)):
        if not _URL.fullmatch(url):
            raise ValueError(
                f"{url!r} is no address of an Ollama; write http://host:port, … with commas between"
            )
    if len(set(urls)) < len(urls):
        raise ValueError("the same Ollama is named twice")
    return value


def ollama_urls(value: str) -> list[str]:
    """The addresses in `ollama_url`."""
    return [url for url in re.split(r"[,\s]+", value) if url]


def _server_id(value: str) -> str:
    if not value or len(value) > 128 or not value.isprintable():
        raise ValueError(f"{value!r} is not a server id; write 1 to 128 printable characters")
    return value


Address = Annotated[str, AfterValidator(_address)]
Place = Annotated[Path, AfterValidator(_place)]


class Settings(BaseSettings):
    """Every setting of the server. Paths are absolute once read, from the working folder."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True
    )

    state_dir: Place = Field(
        default=Path("var"),
        validate_default=True,
        description="Models, spool, caches and the local Postgres.",
    )
    cycles_dir: Place = Field(
        default=Path("cycles"), validate_default=True, description="One folder for each cycle of the loop."
    )
    model_name: str = Field(
        default="gemma-3-270m",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="The model that is served.",
    )
    base_gguf: Place = Field(
        default_factory=lambda data: data.get("state_dir", Path("var")) / "models/gemma-3-270m-q4_k_m.gguf",
        description="The untouched model, installed as <model_name>:base when there is no route yet.",
    )
    models_max_bytes: ByteSize = Field(
        default=ByteSize(0),
        ge=0,
        description="What all installed model versions may take on disk together, 20GiB …; 0: all there is.",
    )
    database_url: SecretStr = Field(
        default=SecretStr(""), description="Postgres' DSN; empty: a local Postgres in <state_dir>/postgres."
    )
    engine: Literal["embedded", "ollama"] = Field(default="embedded", description="What generates tokens.")
    ollama_url: Annotated[str, AfterValidator(_ollamas)] = Field(
        default="",
        description="A running Ollama, or several, with commas between them, which then share the requests;"
        " empty: the server starts one itself.",
    )
    ollama_bin: str = Field(default="ollama", description="The program to start, a path or a name on PATH.")
    grpc_address: Address = Field(default="127.0.0.1:50051", description="Where gRPC listens; port 0: any.")
    http_address: Address = Field(default="127.0.0.1:8080", description="Where health and metrics listen.")
    allow_plaintext: bool = Field(
        default=False, description="Listen on addresses that other machines reach, without TLS."
    )
    tls_cert_file: Place | None = Field(
        default=None,
        description="PEM: the certificate of both ports, then those between it and its authority; read again"
        " when it changes.",
    )
    tls_key_file: Place | None = Field(default=None, description="PEM, not encrypted: its key.")
    tls_client_ca_file: Place | None = Field(
        default=None,
        description="PEM: callers of both ports must show a certificate of one of these authorities.",
    )
    context_tokens: int = Field(default=4096, ge=256, le=131072, description="Tokens of one conversation.")
    parallel: int = Field(
        default=4, ge=1, le=256, description="Generations at once; of each Ollama, where there are several."
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="Threads of the embedded engine; 0: all cores."
    )
    queue_size: int = Field(
        default=64, ge=0, le=100_000, description="Requests of each priority that may wait for a place."
    )
    queue_per_caller: int = Field(
        default=32, ge=1, le=100_000, description="How many of them may be of one caller."
    )
    queue_seconds: float = Field(
        default=30, gt=0, le=3600, description="How long a request may wait for a place."
    )
    quota_servers: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Servers behind one balancer that share what each caller may use; each lets an equal part"
        " of it through.",
    )
    memory_floor: ByteSize = Field(
        default=ByteSize(256 * 1024**2),
        ge=0,
        description="With less memory free than this, nothing new begins; 0: nobody looks.",
    )
    default_deadline_seconds: float = Field(
        default=300, gt=0, le=86400, description="The deadline of a caller that sets none."
    )
    unread_seconds: float = Field(
        default=30, gt=0, le=3600, description="How long a caller may leave an answer unread: then it ends."
    )
    gpu_handover: HandoverMode = Field(
        default=HandoverMode.OFF,
        description="How serving gives way to a training that wants its GPU: off (not at all), drain"
        " (requests are refused until it is back), shrink (they are answered on the processor).",
    )
    gpu_lease_seconds: float = Field(
        default=30, ge=2, le=3600, description="A training that is silent for so long has lost the GPU."
    )
    gpu_lease_max_seconds: float = Field(
        default=6 * 3600, ge=1, le=7 * 86400, description="How long a training may have the GPU at most."
    )
    gpu_drain_seconds: float = Field(
        default=30, ge=0, le=3600, description="What requests get to end in when the GPU is handed over."
    )
    gpu_small_context_tokens: int = Field(
        default=1024, ge=256, le=131072, description="Tokens of one conversation while serving is shrunk."
    )
    grace_seconds: float = Field(
        default=10, ge=0, le=3600, description="What streams get to end at shutdown."
    )
    spool_dir: Place = Field(
        default_factory=lambda data: data.get("state_dir", Path("var")) / "spool",
        description="Log records that are not in Postgres yet.",
    )
    spool_max_bytes: ByteSize = Field(
        default=ByteSize(1024**3),
        ge=1024**2,
        description="A spool of this size refuses new work; 1GiB, 500MB …",
    )
    spool_max_records: int = Field(
        default=1_000_000,
        ge=1000,
        le=1_000_000_000,
        description="A spool of so many records refuses new work.",
    )
    spool_keep_seconds: int = Field(
        default=0,
        ge=0,
        le=30 * 86400,
        description="How long records stay on disk after Postgres has them, to be stored again in one that"
        " was restored to before; half of spool_max_bytes at most.",
    )
    redaction: Literal["off", "mask", "hash"] = Field(
        default="hash",
        description="Secrets and personal data in the log: kept, masked, or replaced by a keyed hash.",
    )
    redaction_key_file: Place = Field(
        default_factory=lambda data: data.get("state_dir", Path("var")) / "redaction.key",
        description="The key of these hashes, 32 bytes, made if missing; servers that share one agree.",
    )
    log_retain_months: int = Field(
        default=0,
        ge=0,
        le=1200,
        description="Months of the log kept before this one; older ones are dropped. 0: all are kept.",
    )
    log_keep_unlearned: bool = Field(
        default=True, description="Keep what no cycle with a verdict has frozen yet, however old it is."
    )
    server_id: Annotated[str, AfterValidator(_server_id)] = Field(
        default_factory=socket.gethostname, description="This server's name in the log; unique, and kept."
    )
    cache_seconds: float = Field(
        default=2,
        gt=0,
        le=2,  # the read that follows takes up to 3 s (postgres.READ_SECONDS)
        description="How old tokens and routes may be where Postgres cannot tell of a change; then a"
        " revocation acts within 5 s, else within one.",
    )
    otlp_endpoint: str = Field(
        default="",
        pattern=r"^(https?://[^\s]+)?$",
        description="An OpenTelemetry collector (gRPC), http://127.0.0.1:4317; empty: no span leaves.",
    )
    trace_share: float = Field(
        default=1, ge=0, le=1, description="Of the calls whose callers have no trace, those that get one."
    )
    jwks: Annotated[str, AfterValidator(_keys_place)] = Field(
        default="",
        description="Public keys of JWTs: a JWKS file, or its URL (https, or http on this machine); empty: "
        "no JWT is taken.",
    )
    jwks_refresh_seconds: float = Field(
        default=300, gt=0, le=86400, description="How often the keys of JWTs are read."
    )
    jwks_retry_seconds: float = Field(
        default=10,
        ge=1,
        le=3600,
        description="A JWT with an unknown key makes the keys be read at once, but not more often than this.",
    )
    jwks_max_age_seconds: float = Field(
        default=86400,
        gt=0,
        le=30 * 86400,
        description="While their source is down, keys of JWTs stay in force for so long.",
    )
    jwt_issuer: str = Field(default="", description="What a JWT's iss must be.")
    jwt_audience: str = Field(default="", description="What a JWT's aud must be, or hold.")
    jwt_leeway_seconds: float = Field(
        default=30, ge=0, le=600, description="How far the clock of a JWT's issuer may be from ours."
    )
    jwt_max_bytes: int = Field(default=8192, ge=256, le=16384, description="Longer JWTs are refused unread.")
    jwt_scopes_claim: str = Field(
        default="scope",
        min_length=1,
        description="The claim with the scopes, a string or a list; a.b looks for b in a.",
    )
    jwt_scope_prefix: str = Field(
        default="", description="What our scopes begin with in that claim, as in agentloop:infer."
    )
    jwt_name_claim: str = Field(
        default="sub", min_length=1, description="The claim with the caller's name for the log."
    )
    jwt_requests_per_minute: int = Field(
        default=0, ge=0, le=10**9, description="Of each caller with a JWT, on each server; 0: no limit."
    )
    jwt_tokens_per_minute: int = Field(
        default=0, ge=0, le=10**9, description="For each caller with a JWT, read and written; 0: no limit."
    )
    jwt_concurrent_streams: int = Field(
        default=0, ge=0, le=10**9, description="For each caller with a JWT, at once; 0: no limit."
    )
    jwt_aliases: Annotated[str, AfterValidator(_alias_names)] = Field(
        default="", description="What callers with a JWT may name, by commas; empty: every alias."
    )
    jwt_limits_claim: str = Field(
        default="agentloop_limits",
        min_length=1,
        description="The claim with limits for its caller: an object as in `tokens list --json`.",
    )
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(lambda v: str(v).upper())
    ] = Field(default="INFO", description="The least severe log line that is written.")

    @model_validator(mode="after")
    def _whole(self) -> Settings:
        if self.jwks and not (self.jwt_issuer and self.jwt_audience):
            raise ValueError(
                f"{PREFIX}JWKS needs {PREFIX}JWT_ISSUER and {PREFIX}JWT_AUDIENCE too: without them the"
                " tokens of any service of that issuer would be taken"
            )
        if self.gpu_handover is not HandoverMode.OFF and len(ollama_urls(self.ollama_url)) > 1:
            raise ValueError(
                f"{PREFIX}GPU_HANDOVER is {self.gpu_handover.value}, and {PREFIX}OLLAMA_URL names several:"
                " which of their GPUs would be lent? Give the one beside the training a server of its own"
            )
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError(f"{PREFIX}TLS_CERT_FILE and {PREFIX}TLS_KEY_FILE need each other")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError(f"{PREFIX}TLS_CLIENT_CA_FILE needs {PREFIX}TLS_CERT_FILE")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given in code (tests), then environment, secret files, `.env`, YAML."""
        del file_secret_settings
        return (
            init_settings,
            env_settings,
            SecretFiles(settings_cls),
            dotenv_settings,
            YamlFile(settings_cls),
        )


def explain(error: ValidationError) -> str:
    """One line for each setting that is wrong; a secret's value is not quoted."""
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if not name:  # of several settings together
            lines.append(problem["msg"].removeprefix("Value error, "))
            continue
        field = Settings.model_fields.get(name)
        secret = field is not None and field.annotation is SecretStr
        value = "" if secret else f" is {problem.get('input')!r}"
        lines.append(f"{PREFIX}{name.upper()}{value}: {problem['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)
