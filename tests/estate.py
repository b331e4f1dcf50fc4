"""A gateway, a database and hosts that serve, on test hosts, with an inventory like a company's own."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agentloop.client import AsyncClient
from agentloop.errors import AgentLoopError
from agentloop.types import Sampling
from scripts.release import make
from tests.ansible_modules import encrypted
from tests.certificates import Authority, Pair
from tests.hosts import ROOT, Host, hosts

ANSIBLE = ROOT / "infra/ansible"
GATEWAY = "gateway1"
PLAY_SECONDS = 1800
PAGES_PORT = 9095
_OF_A_COMPANY = (
    "monitoring_docs_url",
    "monitoring_mail_server",
    "monitoring_pages_mail",
    "monitoring_tickets_mail",
)
"""What the example says that has no place in a test: mail to example.com."""
SETTINGS = {
    "parallel": 8,
    "context_tokens": 1024,
    "queue_size": 256,
    "queue_per_caller": 256,
    "queue_seconds": 300.0,
    "memory_floor": 0,
}
"""Of servers that many ask at once on few cores."""
_RECAP = re.compile(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Played:
    """How a playbook ended; `changed` by host."""

    code: int
    out: str
    changed: dict[str, int]


@dataclass
class Estate:
    """The hosts, and the inventory that leads to them."""

    hosts: dict[str, Host]
    folder: Path
    authority: Authority
    base_gguf: Path

    def play(self, playbook: str, *more: str) -> Played:
        """Play one of our playbooks on these hosts."""
        process = self.start(playbook, *more)
        out, _ = process.communicate(timeout=PLAY_SECONDS)
        changed = {host: int(count) for host, count, _, _ in _RECAP.findall(out)}
        return Played(process.returncode, out, changed)

    def start(self, playbook: str, *more: str) -> subprocess.Popen[str]:
        """Begin to play it, in a process group of its own."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AGENTLOOP_", "ANSIBLE_"))}
        options = self.hosts[GATEWAY].ssh_options
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "ansible", "playbook", str(ANSIBLE / f"playbooks/{playbook}.yml")),
                *("--inventory", str(self.folder / "inventory/hosts.yml")),
                *("--vault-password-file", str(self.folder / "vault-password"), *more),
            ],
            env=environment
            | {
                "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
                "ANSIBLE_HOME": str(self.folder / "ansible"),
                "ANSIBLE_SSH_ARGS": " ".join(["-o ControlMaster=auto -o ControlPersist=60s", *options]),
                "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.folder / "cp"),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def servers(self) -> list[str]:
        """The hosts that serve."""
        return [name for name in self.hosts if name.startswith("server")]

    def token(self, name: str, colour: str = "green") -> str:
        """A new token of the scope infer."""
        environment = (
            f"AGENTLOOP_CONFIG=/etc/agentloop/{colour}/server.yml"
            f" AGENTLOOP_DATABASE_URL_FILE=/etc/agentloop/{colour}/database_url"
        )
        server = self.hosts[self.servers()[0]]
        python = f"/opt/agentloop/{colour}/bin/python"
        create = f"-m grpc_server tokens create --name {name} --scopes infer 2>/dev/null"
        return server.run(f"{environment} {python} {create}").strip()

    def certify(self, name: str, pair: Pair | None = None) -> None:
        """Have a host's certificate in the inventory, and its key in the vault: a new one, or this."""
        pair = pair or self.authority.sign(name, address=self.hosts[name].address)
        (self.folder / f"inventory/tls/{name}.crt").write_bytes(pair.certificate)
        self._vault(f"host_vars/{name}/vault.yml", {"tls_key": pair.key.decode()})

    def write_secrets(self, password: str) -> None:
        """Those of all hosts, with this password of Postgres' user."""
        self._vault(
            "group_vars/all/vault.yml",
            {
                "postgres_agentloop_password": password,
                "redaction_key": base64.b64encode(bytes(range(32))).decode(),
                "backup_passphrase": "a long & odd: passphrase/'2",
            },
        )

    def _vault(self, name: str, content: dict[str, str]) -> None:
        password = (self.folder / "vault-password").read_bytes().strip()
        path = self.folder / "inventory" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encrypted(yaml.safe_dump(content).encode(), password))

    @property
    def outside(self) -> str:
        """This machine's address, as the hosts see it."""
        return self.hosts[GATEWAY].address.rpartition(".")[0] + ".1"

    def write_inventory(self, settings: dict[str, Any], more: dict[str, Any]) -> None:
        """As inventories/site, with our hosts, certificates and secrets; `more` are further variables."""
        inventory = self.folder / "inventory"
        shutil.copytree(ANSIBLE / "inventories/site/group_vars", inventory / "group_vars")
        (inventory / "tls").mkdir()
        (inventory / "tls/ca.crt").write_bytes(self.authority.pem)
        groups: dict[str, dict[str, Any]] = {
            "gateways": {GATEWAY: {}},
            "databases": {GATEWAY: {}},
            "monitors": {GATEWAY: {}},
            "engines": {GATEWAY: {}} if "ollama_archive" in more else {},
            "servers": {name: {} for name in self.servers()},
        }
        (self.folder / "vault-password").write_text("a password of the vault\n")
        for name in self.hosts:
            self.certify(name)
        listed = {group: {"hosts": members} for group, members in groups.items()}
        addresses = {name: {"ansible_host": host.address} for name, host in self.hosts.items()}
        _yaml(inventory / "hosts.yml", {"all": {"hosts": addresses}, **listed})
        network = self.hosts[GATEWAY].address.rpartition(".")[0] + ".0/24"
        self.write_secrets("a long & odd: password/'1")
        _yaml(
            inventory / "group_vars/all/ours.yml",
            {
                "site_network": [network],
                # One host is gateway and database here: a variable of both groups would be that of one.
                "base_open": [
                    {
                        "name": "all",
                        "ports": [50051, 50052, 8443, 8404, 8080, 8081, 5432, 9090, 11434],
                        "from": [],
                    }
                ],
                "monitoring_docs_url": "https://docs",
                "monitoring_pages_url": f"http://{self.outside}:{PAGES_PORT}/alerts",
                "monitoring_tickets_url": f"http://{self.outside}:{PAGES_PORT}/tickets",
                "server_base_gguf": str(self.base_gguf),
                "server_settings": settings,
                "server_watch_seconds": 5,
                "server_probe_latency_factor": 10.0,
                "server_probe_latency_slack": 60.0,
                **more,
            },
        )
        for group in groups:
            path = inventory / f"group_vars/{group}.yml"
            given = yaml.safe_load(path.read_text())
            ours = {"base_open", "server_settings", *more, *_OF_A_COMPANY}
            _yaml(path, {name: value for name, value in given.items() if name not in ours})


@contextmanager
def estate(
    folder: Path, base_gguf: Path, servers: Sequence[str], settings: dict[str, Any], **more: Any
) -> Iterator[Estate]:
    """One host that is gateway, database and monitor, and so many that serve; bare until a play.

    With `ollama_archive` the first is an engine, too. `more` are further variables of all hosts.
    """
    with hosts(folder, [GATEWAY, *servers]) as there:
        made = Estate(there, folder, Authority("the company"), base_gguf)
        made.write_inventory(settings, more)
        yield made


def release_of(folder: Path, more: str = "") -> Path:
    """This checkout's release; with `more` at the end of one of its modules."""
    source = folder / "source"
    source.mkdir()
    tree = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "x"], cwd=source, input=tree, check=True)
    with (source / "grpc_server/__init__.py").open("a") as module:
        module.write(more)
    return make(source, folder)[1]


def _yaml(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))


@dataclass
class Traffic:
    """Callers who ask a gateway again and again, each with one stream at a time, through the typed client."""

    server: str
    token: str
    ca_file: Path
    streams: int
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    slowest: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[Traffic]:
        """They ask while the block runs; at its end those that ask get their answers."""
        thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def wait_for(self, more: int, seconds: float = 600) -> None:
        """Return when so many more requests have been answered."""
        wanted, until = self.answered + more, time.monotonic() + seconds
        while self.answered < wanted:
            assert time.monotonic() < until, f"{self.answered} of {wanted} answers; failed: {self.failed[:3]}"
            time.sleep(0.1)

    async def _run(self) -> None:
        async with AsyncClient(self.server, self.token, ca_file=self.ca_file) as client:
            await asyncio.gather(*(self._ask(client, number) for number in range(self.streams)))

    async def _ask(self, client: AsyncClient, number: int) -> None:
        sampling = Sampling(max_tokens=4, temperature=0.0)
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                await client.ask(f"Say {number}.", sampling=sampling, timeout_s=300)
            except AgentLoopError as error:
                self.failed.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(1)
            else:
                self.answered += 1
                self.slowest = max(self.slowest, time.monotonic() - began)

    def plain(self) -> str:
        """For a person."""
        return json.dumps(
            {"answered": self.answered, "failed": len(self.failed), "slowest_s": round(self.slowest, 2)}
        )
