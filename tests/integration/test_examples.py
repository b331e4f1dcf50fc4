"""The examples in other languages call a real server, set up as their readers are told to."""

from __future__ import annotations

import os
import re
import subprocess
import time

import psycopg
import pytest

from agentloop import Client, Sampling
from grpc_server.adapters.local_postgres import LocalPostgres
from tests.live_server import ROOT, LiveServer

PROMPT = "Name a colour."
FIRST_SECONDS = 240
"""With empty caches: modules are downloaded, and gRPC is compiled."""

examples = pytest.mark.parametrize("name", ["go", "typescript"])


def example(name: str, server: LiveServer, token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {each: value for each, value in os.environ.items() if not each.startswith("AGENTLOOP_")}
    return subprocess.run(
        [str(ROOT / "scripts" / "example.sh"), name, "--server", server.grpc_address, *arguments],
        env=clean | {"AGENTLOOP_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=FIRST_SECONDS,
        check=False,
    )


def feedback_on(server: LiveServer, inference_id: str) -> bool | None:
    """What the log has of it, waiting for the spool."""
    query = 'SELECT "boolean" FROM feedback WHERE inference_id = %s'
    until = time.monotonic() + 30
    with (
        LocalPostgres(server.state_dir / "postgres") as postgres,
        psycopg.connect(postgres.dsn()) as database,
    ):
        database.autocommit = True
        while time.monotonic() < until:
            if row := database.execute(query, (inference_id,)).fetchone():
                return bool(row[0])
            time.sleep(0.05)
    return None


@examples
@pytest.mark.timeout(FIRST_SECONDS + 60)
def test_an_example_streams_the_answer_and_says_that_it_was_good(live_server: LiveServer, name: str) -> None:
    token = live_server.token("infer", "feedback", name=f"{name} example")
    with Client(live_server.grpc_address, token) as client:
        answer = client.ask(PROMPT, sampling=Sampling(temperature=0, max_tokens=8))
    done = example(name, live_server, token, "--max-tokens", "8", PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer.text + "\n"
    found = re.search(r"^inference (\S+) by gemma-3-270m:base$", done.stderr, re.MULTILINE)
    assert found is not None, done.stderr
    assert f"{answer.completed.output_tokens} tokens written" in done.stderr
    assert feedback_on(live_server, found[1]) is True


@examples
@pytest.mark.timeout(FIRST_SECONDS + 60)
def test_an_example_tells_what_went_wrong(live_server: LiveServer, name: str) -> None:
    done = example(name, live_server, "al_nobody", PROMPT)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search("UNAUTHENTICATED|Unauthenticated", done.stderr)
    done = example(name, live_server, "al_nobody")
    assert done.returncode != 0
    assert "give one prompt" in done.stderr


def test_the_go_example_reads_the_details_of_an_error(live_server: LiveServer) -> None:
    done = example("go", live_server, live_server.token("infer"), "--max-tokens", "0", PROMPT)
    assert done.returncode == 1
    assert "field: sampling.max_tokens" in done.stderr


def test_an_example_that_is_none_is_named() -> None:
    script = str(ROOT / "scripts" / "example.sh")
    for name in ([], ["perl"]):
        done = subprocess.run([script, *name], capture_output=True, text=True, check=False)
        assert (done.returncode, "there are go and typescript" in done.stderr) == (2, True)
