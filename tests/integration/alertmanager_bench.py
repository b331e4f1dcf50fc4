"""A real Alertmanager with our configuration, and those who are told: a mail server and a web hook."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from tests.integration.prometheus_bench import SECONDS, answers, free_address, running
from tests.live_server import ROOT

CONFIG = ROOT / "infra" / "alertmanager" / "alertmanager.yml"


@dataclass
class Alertmanager:
    """Where it is, and what it delivered: (recipients, subject, text) of mails, JSON of calls."""

    address: str = ""
    mails: list[tuple[list[str], str, str]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    async def fire(self, *alerts: Mapping[str, str], ended: str = "") -> None:
        """Send alerts, by their labels, as Prometheus does."""
        body = [{"labels": labels} | ({"endsAt": ended} if ended else {}) for labels in alerts]
        async with httpx.AsyncClient(trust_env=False) as client:
            (await client.post(f"http://{self.address}/api/v2/alerts", json=body)).raise_for_status()

    async def until_mailed(self, to: str, words: str) -> None:
        """Until somebody was mailed these words, in the subject or the text."""
        for _ in range(int(SECONDS / 0.05)):
            if any(to in rcpt and words in subject + text for rcpt, subject, text in list(self.mails)):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{to} was not told of {words!r}: {self.mails}")

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """A mail came."""
        assert isinstance(envelope.content, bytes)
        mail = message_from_bytes(envelope.content, policy=policy.default)
        body = mail.get_body(("html", "plain"))
        text = "" if body is None else str(body.get_content())
        self.mails.append((list(envelope.rcpt_tos), str(mail["subject"]), text))
        return "250 OK"


@contextlib.contextmanager
def _mail_server(manager: Alertmanager) -> Iterator[str]:
    host, _, port = free_address().partition(":")
    server = Controller(manager, hostname=host, port=int(port))
    server.start()
    try:
        yield f"{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def _web_hook(manager: Alertmanager) -> Iterator[str]:
    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            manager.calls.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/alerts"
        server.shutdown()


@contextlib.asynccontextmanager
async def alertmanager(place: Path) -> AsyncIterator[Alertmanager]:
    """It, with our configuration, but for the addresses, TLS of the mail server, and how long it waits."""
    place.mkdir()  # noqa: ASYNC240 - nobody waits
    manager = Alertmanager(free_address())
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    with _mail_server(manager) as mail, _web_hook(manager) as hook:
        config["global"] |= {"smtp_smarthost": mail, "smtp_require_tls": False}
        quick = {"group_wait": "500ms", "group_interval": "200ms"}
        config["route"] |= quick
        for route in config["route"]["routes"]:
            route |= quick
        for receiver in config["receivers"]:
            for each in receiver.get("webhook_configs", ()):
                each["url"] = hook
        (place / "alertmanager.yml").write_text(yaml.safe_dump(config))
        arguments = [
            "prometheus-alertmanager",
            f"--config.file={place / 'alertmanager.yml'}",
            f"--storage.path={place / 'data'}",
            f"--web.listen-address={manager.address}",
            "--cluster.listen-address=",
        ]
        with running(arguments, place / "alertmanager.log") as process:
            await answers(f"http://{manager.address}/-/ready", process, place / "alertmanager.log")
            yield manager
