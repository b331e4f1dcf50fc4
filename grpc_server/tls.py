"""TLS for both ports: a certificate, its key and the authority of clients, from files that may change.

Files are read every few seconds. What has changed and fits together serves the connections that are made from
then on; those that are open stay as they are. What does not fit, as when a new certificate is there and its
key is not yet, leaves the pair before it in force, and is in the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from grpc_server.domain.errors import Precondition

RELOAD_SECONDS = 2.0
MAX_FILE_BYTES = 1024 * 1024
SOON = timedelta(days=14)
"""A certificate that ends sooner is in the log as a warning."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Material:
    """What the files hold: PEM. Without `client_ca` clients need no certificate."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None = None


class Certificates:
    """The certificate in force, for gRPC and for HTTP.

    Args:
        certificate_file: PEM: the server's certificate, then those between it and its authority.
        key_file: PEM, not encrypted.
        client_ca_file: PEM: whoever connects must show a certificate of one of these authorities.

    Raises:
        Precondition: if they cannot be read, do not fit together, or the certificate has ended.
    """

    def __init__(
        self,
        certificate_file: Path,
        key_file: Path,
        client_ca_file: Path | None = None,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._files = (certificate_file, key_file, client_ca_file)
        self._now = now
        self._refused: Material | str = ""
        self._take(_read(*self._files))

    def _take(self, material: Material) -> None:
        context, ends = context_of(material), _end_of(material)
        if ends <= self._now():
            raise Precondition(f"the certificate in {self._files[0]} has ended on {ends:%Y-%m-%d}; renew it")
        level = logging.WARNING if ends - self._now() < SOON else logging.INFO
        _log.log(level, "the TLS certificate is in force", extra={"ends": ends.isoformat()})
        self._material, self.context, self._grpc = material, context, _grpc_configuration(material)

    def reload(self) -> bool:
        """Take what the files hold now, if that is new and sound; a fault is logged once, not each time."""
        fault: Material | str = ""
        try:
            material = _read(*self._files)
            if material in (self._material, self._refused):
                return False
            fault = material
            self._take(material)
        except Precondition as error:
            fault = fault or str(error)
            if fault != self._refused:
                _log.error("the new TLS files are not taken; the pair before stays in force: %s", error)
            self._refused = fault
            return False
        self._refused = ""
        return True

    async def keep_reading(self) -> None:
        """Look at the files every few seconds, for ever."""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            try:
                await asyncio.to_thread(self.reload)
            except Exception:  # whatever it was, the pair in force stays
                _log.exception("the TLS files could not be looked at")

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For gRPC's port; asks for the pair in force at each new connection."""
        given = self._grpc

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            if given is self._grpc:
                return None  # as before
            given = self._grpc
            return given

        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            given,
            fetch,  # type: ignore[arg-type] # None is allowed: "unchanged"
            require_client_authentication=self._material.client_ca is not None,
        )
        return credentials

    def http_context(self) -> ssl.SSLContext:
        """For asyncio's servers; takes the pair in force for each new connection."""
        latest = _Latest(ssl.PROTOCOL_TLS_SERVER)
        latest.certificates = self
        return latest


class _Latest(ssl.SSLContext):
    """Hands each connection to the context in force: one that is open cannot forget an authority."""

    certificates: Certificates

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self.certificates.context.wrap_bio(*args, **kwargs)


def context_of(material: Material) -> ssl.SSLContext:
    """What OpenSSL makes of it. Raises Precondition if that is nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    descriptor = os.memfd_create("pair")  # OpenSSL reads files only, and a key is not for a disk
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(material.certificate + b"\n" + material.key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=_no_password)
        if material.client_ca is not None:
            context.load_verify_locations(cadata=material.client_ca.decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, ValueError, OSError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise Precondition(f"certificate, key and client authority do not fit together: {reason}") from error
    finally:
        os.close(descriptor)
    return context


def _grpc_configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    pairs = [(material.key, material.certificate)]
    configuration: grpc.ServerCertificateConfiguration = grpc.ssl_server_certificate_configuration(
        pairs, root_certificates=material.client_ca
    )
    return configuration


def _end_of(material: Material) -> datetime:
    try:
        return x509.load_pem_x509_certificates(material.certificate)[0].not_valid_after_utc
    except (ValueError, IndexError) as error:
        raise Precondition("the certificate is no X.509 certificate in PEM") from error


def _read(certificate_file: Path, key_file: Path, client_ca_file: Path | None) -> Material:
    client_ca = None if client_ca_file is None else _content(client_ca_file)
    return Material(_content(certificate_file), _content(key_file), client_ca)


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise Precondition(f"{path} cannot be read: {error.strerror}") from error


def _no_password() -> bytes:
    """Raises for an encrypted key, instead of asking at a terminal."""
    raise ValueError("the key is encrypted")
