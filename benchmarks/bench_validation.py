"""What validating a night costs: `python -m validation check` as the night calls it, from start to exit.

Snapshots of 10,000, 100,000 and 1,000,000 rows, each checked by a process of its own and its workers, one a
core: wall time, processor time, and the greatest memory of all of them together (the sum of PSS, looked at
every 0.1 s). Linear means that a row of the last 900,000 costs as much processor time as one of the 90,000
before.

The rows are made of the leaderboard's questions, in the form in which freezing writes them. Every prompt,
every answer and every id is another one: numbers are drawn anew, and words of other questions are added. What
repeats are the tools: 1,711 sets, drawn evenly, so that of 1,000,000 rows 99.8 % have a set that came before,
and of 10,000 rows 83 %. A set that is new costs just under 1 ms, one that is known 1 µs; services have fewer
sets than that, and sets that change with every request would not reach this rate. Two rows in three have a
call in their answer, a third has feedback, half of it a demonstration; 3 % break a rule.
"""

from __future__ import annotations

import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from uuid6 import uuid7

from benchmarks.line import Line
from grpc_server.domain.plain import plain
from training import bfcl
from validation import snapshot
from validation.files import sha256, write_json

SIZES = (10_000, 100_000, 1_000_000)
ROWS_A_GROUP = 1000  # as `validation freeze` writes them
START = datetime(2026, 1, 30, 12, 0, tzinfo=UTC)
_SAMPLING = '{"seed": 1, "stop": [], "top_k": 1, "top_p": 1.0, "max_tokens": 256, "temperature": 0.0}'
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Cost:
    """What one check took: seconds, seconds of processor time, and 10^9 bytes at most."""

    wall: float
    cpu: float
    memory_gb: float


@dataclass(frozen=True)
class Question:
    """A question of the leaderboard, its tools and its answer as JSON."""

    prompt: str
    tools_json: str
    call_json: str
    tools: int


def questions() -> list[Question]:
    """All that traffic is made of."""
    found = []
    for category in bfcl.TRAFFIC_CATEGORIES:
        for item in bfcl.items(category):
            call = item.demonstration
            tools = [
                {"name": tool.name, "parameters": plain(tool.parameters), "description": tool.description}
                for tool in item.tools
            ]
            found.append(
                Question(
                    item.messages[-1].content,
                    json.dumps(tools),
                    json.dumps({"name": call.name, "arguments": plain(call.arguments)}),
                    len(tools),
                )
            )
    return found


def rows(count: int, seed: int = 7) -> Iterator[dict[str, Any]]:
    """So many rows as they are frozen."""
    drawn = random.Random(seed)
    asked = questions()
    words = [word for question in asked for word in question.prompt.split()]
    for number in range(count):
        question = asked[drawn.randrange(len(asked))]
        again = lambda found: str(drawn.randrange(1, 10 ** len(found[0])))  # noqa: E731
        context = " ".join(drawn.choices(words, k=drawn.randrange(4, 24)))
        prompt = f"{_NUMBER.sub(again, question.prompt)} ({context}, {number})"
        call = question.call_json
        if drawn.random() < 0.02:
            call = '{"name": "no_such_tool", "arguments": {}}'
        said = f"The answer is {number}: {' '.join(drawn.choices(words, k=20))}."
        calls = drawn.random() < 0.66
        answer = _message("assistant", "" if calls else said, [call] if calls else [])
        failed = drawn.random() < 0.01
        feedback = "[]"
        if drawn.random() < 0.33:
            shown = _message("assistant", "", [call]) if drawn.random() < 0.5 else "null"
            yes = "true" if shown == "null" else "null"
            values = f'"boolean": {yes}, "score": null, "comment": null, "demonstration": {shown}'
            feedback = f'[{{"id": "{uuid7()}", {values}}}]'
        started = START + timedelta(milliseconds=80 * number)
        yield {
            "inference_id": str(uuid7()),
            "changed_xid": str(1000 + number // 50),
            "caller": f"service-{drawn.randrange(30)}",
            "key_id": "k" * 12,
            "alias": "default",
            "model_version": "gemma-3-270m:20260129T020000Z",
            "target_role": "stable",
            "session_id": f"session-{number // 3}",
            "request_json": (
                f'{{"tools": {question.tools_json}, "messages": [{_message("user", prompt, [])}],'
                f' "sampling": {_SAMPLING}, "tool_choice": "auto", "response_schema": null}}'
            ),
            "answer_json": answer,
            "status": "error" if failed else "ok",
            "finish_reason": None if failed else "stop",
            "error": "",
            "input_tokens": 200,
            "output_tokens": 40,
            "queue_ms": 0.5,
            "ttft_ms": 30.0,
            "total_ms": 120.0,
            "started_at": started,
            "ended_at": started + timedelta(milliseconds=120),
            "feedback_json": feedback,
            "prompt_chars": len(prompt),
            "answer_chars": 0 if calls else len(said),
            "messages": 1,
            "tools": question.tools,
            "tool_calls": int(calls),
            "feedback_count": int(feedback != "[]"),
            "demonstrations": int('"demonstration": {' in feedback),
        }


def _message(role: str, content: str, calls: list[str]) -> str:
    text = json.dumps(content)
    return f'{{"role": "{role}", "content": {text}, "tool_name": "", "tool_calls": [{", ".join(calls)}]}}'


def write(cycle: Path, count: int) -> None:
    """A cycle with a snapshot of so many rows."""
    folder = cycle / "snapshot"
    folder.mkdir(parents=True)
    made = rows(count)
    with pq.ParquetWriter(folder / snapshot.ROWS, snapshot.SCHEMA, compression="zstd") as file:
        for _ in range(0, count, ROWS_A_GROUP):
            group = [row for row, _ in zip(made, range(ROWS_A_GROUP), strict=False)]
            file.write_batch(pa.RecordBatch.from_pylist(group, schema=snapshot.SCHEMA))
    files = {snapshot.ROWS: sha256(folder / snapshot.ROWS)}
    write_json(folder / snapshot.RECORD, {"rows": count, "files": files, "watermark_to": "800"})


def checked(cycle: Path) -> Cost:
    """Check a cycle's snapshot once, and what that took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    command = [sys.executable, "-m", "validation", "check", "--cycle", str(cycle), "--json"]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, _memory(process.pid))
            time.sleep(0.1)
    wall = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"`validation check` of {cycle.name} ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, most / 1e9)


def _memory(pid: int) -> int:
    """Bytes that a process and its children hold together: shared pages count once."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:  # one has just ended
        return total
    return total


def run() -> Iterator[Line]:
    """Make the snapshots, check each of them; three to four minutes."""
    costs: dict[int, Cost] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in SIZES:
            # Each in a folder of its own: no earlier night to compare with.
            cycle = Path(folder) / str(count) / "20260131T020000Z"
            write(cycle, count)
            costs[count] = checked(cycle)
    small, middle, large = (costs[size] for size in SIZES)
    yield Line("validation", "validation_rows_per_s", SIZES[2] / large.wall, "rows/s", "-", None, ">= 16667")
    yield Line("validation", "validation_s_1e6", large.wall, "s", "1e5 rows", middle.wall, "<= 60")
    yield Line("validation", "validation_gb_1e6", large.memory_gb, "GB", "1e5 rows", middle.memory_gb, "<= 2")
    before = 1e6 * (middle.cpu - small.cpu) / (SIZES[1] - SIZES[0])
    after = 1e6 * (large.cpu - middle.cpu) / (SIZES[2] - SIZES[1])
    yield Line("validation", "validation_cpu_us_a_row", after, "us", "rows before 1e5", before)
    yield Line(
        "validation", "validation_cpu_growth", after / before, "ratio", "rows before 1e5", 1.0, "<= 1.2"
    )
    yield Line("validation", "validation_s_1e4", small.wall, "s", "-", None)
