"""The demo without a service: counting, choosing, figures, table, messages."""

from __future__ import annotations

import asyncio
import io
import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agentloop import night as records
from agentloop.types import Route, Target
from demo import figures, night, questions
from demo.failure import LinkError, tail
from demo.figures import Observed
from demo.mishaps import MALFORMED
from demo.night import Night
from demo.plan import HOME, Plan
from demo.screen import Screen
from demo.serving import assemble_model, gguf_of, without_canary, write_private
from demo.table import rows, table
from demo.tally import Kind, Outcome, Tally
from training.bfcl import traffic

# What demo.json promises to hold.
NAMES = {
    "requests",
    "requests_failed",
    "ttft_p50_ms",
    "ttft_p95_ms",
    "rows_accepted",
    "rows_logged",
    "rows_quarantined",
    "examples_kept",
    "examples_excluded",
    "loss_first",
    "loss_last",
    "tokens_per_s",
    "peak_memory_gb",
    "gguf_mb",
    "base_constrained_accuracy",
    "champion_accuracy",
    "candidate_accuracy",
    "verdict",
    "route_before",
    "route_after",
    "rollout_requests",
    "rollout_failed_requests",
    "seconds",
}


def outcome(kind: Kind = "request", *, expected: bool = True, **more: Any) -> Outcome:
    return Outcome(kind, "travel-desk", "OK" if expected else "UNAVAILABLE", expected, **more)


def observed(tally: Tally | None = None) -> Observed:
    before = Route("default", 1, (Target("m:base", "stable", 100),))
    after = Route("default", 3, (Target("m:20260101T000000Z", "stable", 100),))
    return Observed(tally or Tally(), 12, 11, 5_430_000_000, before, after, 61.23)


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def cycle_dir(tmp_path: Path) -> Path:
    put(tmp_path / "validation/result.json", {"quarantined_rows": 2})
    put(
        tmp_path / "dataset/dataset.json",
        {"new_train": 30, "new_gate": 5, "train": 90, "gate": 15, "excluded": {"no_demonstration": 4}},
    )
    put(tmp_path / "adapter/finetune.json", {"loss_first": 2.5, "loss_last": 0.25, "tokens_per_s": 250.0})
    put(tmp_path / "quantize.json", {"size_bytes": 253_115_000})
    subject = {"n": 100, "accuracy": 0.36, "ci_low": 0.27234, "ci_high": 0.4581}
    summary = {"base_constrained": subject | {"accuracy": 0.06}, "champion": subject, "candidate": subject}
    put(tmp_path / "evaluation/summary.json", {"simple_python": summary})
    put(tmp_path / "gate.json", {"verdict": "pass"})
    put(tmp_path / "rollout.json", {"requests": 40, "failed_requests": 0})
    return tmp_path


def test_the_figures_have_every_name_that_was_promised(cycle_dir: Path) -> None:
    shown = figures.figures(observed(), cycle_dir)
    intervals = {f"{subject}_accuracy_ci" for subject in figures.SUBJECTS}
    assert set(shown) == NAMES | intervals


def test_the_figures_are_those_of_the_cycle(cycle_dir: Path) -> None:
    tally = Tally([outcome(ttft_ms=100.0), outcome(expected=False)])
    shown = figures.figures(observed(tally), cycle_dir)
    assert (shown["requests"], shown["requests_failed"], shown["ttft_p50_ms"]) == (2, 1, 100.0)
    assert (shown["rows_accepted"], shown["rows_logged"], shown["rows_quarantined"]) == (12, 11, 2)
    assert (shown["examples_kept"], shown["examples_excluded"]) == (35, {"no_demonstration": 4})
    assert (shown["loss_first"], shown["loss_last"], shown["tokens_per_s"]) == (2.5, 0.25, 250.0)
    assert (shown["peak_memory_gb"], shown["gguf_mb"], shown["seconds"]) == (5.43, 253.1, 61.2)
    assert (shown["base_constrained_accuracy"], shown["candidate_accuracy"]) == (0.06, 0.36)
    assert shown["candidate_accuracy_ci"] == [0.2723, 0.4581]
    assert (shown["verdict"], shown["rollout_requests"], shown["rollout_failed_requests"]) == ("pass", 40, 0)
    assert shown["route_before"] == [{"model_version": "m:base", "role": "stable", "weight": 100}]
    assert shown["route_after"][0]["model_version"] == "m:20260101T000000Z"


def test_a_night_that_was_skipped_has_figures_too(tmp_path: Path) -> None:
    shown = figures.figures(observed(), tmp_path)
    assert shown["verdict"] == "skipped"
    assert shown["candidate_accuracy"] is None
    assert shown["ttft_p50_ms"] is None
    assert rows(shown, Tally())


def test_demo_json_is_what_was_shown(cycle_dir: Path) -> None:
    shown = figures.figures(observed(), cycle_dir)
    path = figures.write(shown, cycle_dir)
    assert path == cycle_dir / "demo.json"
    assert json.loads(path.read_text()) == shown


def test_the_table_shows_accuracies_with_their_intervals_and_mishaps_apart(cycle_dir: Path) -> None:
    tally = Tally([outcome(model_version="m:1"), outcome("cancelled"), outcome("malformed")])
    text = dict(rows(figures.figures(observed(tally), cycle_dir), tally))
    assert text["candidate"] == "0.36 (0.27 to 0.46)"
    assert text["requests"] == "1, of which failed: 0"
    assert text["went wrong on purpose"] == "1 cancelled, 1 malformed"
    assert text["answered by"] == "1 m:1"
    assert text["route after"] == "m:20260101T000000Z (stable 100 %)"
    console = Console(file=io.StringIO(), width=100)
    console.print(table(figures.figures(observed(tally), cycle_dir), tally))
    assert "0.36 (0.27 to 0.46)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_percentiles_interpolate_between_what_was_measured() -> None:
    tally = Tally([outcome(ttft_ms=float(number)) for number in range(1, 102)])
    assert (tally.ttft_ms(50), tally.ttft_ms(95)) == (51.0, 96.0)
    assert Tally([outcome(ttft_ms=7.0)]).ttft_ms(95) == 7.0
    assert Tally().ttft_ms(50) is None


def test_a_mishap_is_no_request_but_fails_if_it_ends_as_it_should_not() -> None:
    tally = Tally()
    tally.add(outcome("malformed", expected=False))
    tally.add(outcome("timed out", inference_id="a"))
    tally.add(outcome(inference_id="b"))
    assert (tally.requests, len(tally.failures)) == (1, 1)
    assert tally.inference_ids == {"a", "b"}
    assert tally.apart() == {"malformed": 1, "timed out": 1}


def test_each_demo_asks_what_no_earlier_one_asked_shorter_prompts_first(tmp_path: Path) -> None:
    first = questions.choose(tmp_path, 5)
    for item in first.items:
        first.shown(item.id)
    second = questions.choose(tmp_path, 5)
    expected = traffic()
    assert [*first.items, *second.items] == expected[:10]
    assert (first.new, second.new) == (5, 5)


def test_when_all_was_asked_it_is_asked_again_and_is_not_new(tmp_path: Path) -> None:
    every = traffic()
    for item in every[1:]:
        questions.remember(tmp_path / questions.FILE, item.id)
    last = questions.choose(tmp_path, 3)
    assert (last.items, last.new) == ((every[0], every[1], every[2]), 1)
    last.shown(every[0].id)
    assert questions.choose(tmp_path, 3) == questions.Questions(tuple(every[:3]), new=0)


def test_each_malformed_request_has_a_name_of_its_own_and_a_status_to_expect() -> None:
    assert len({malformed.name for malformed in MALFORMED}) == len(MALFORMED)
    assert all(malformed.refusals and "OK" not in malformed.refusals for malformed in MALFORMED)


def test_a_broken_link_names_itself_the_end_of_its_log_and_a_remedy(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("\n".join(f"line {number}" for number in range(100)) + "\n\x1b[31mred")
    text = str(LinkError("engine", "it died", "start it", log))
    assert text.startswith("engine: it died")
    assert f"the end of {log}:" in text
    assert "line 99" in text
    assert "line 1\n" not in text
    assert "\x1b" not in text
    assert text.endswith("What to do: start it")


def test_a_log_that_is_not_there_has_no_end(tmp_path: Path) -> None:
    assert tail(tmp_path / "none") == []
    assert str(LinkError("a", "b", "c")) == "a: b\nWhat to do: c"


CYCLE = "20260101T000000Z"


class Ended:
    """The program of a run that has ended."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.log = Path("night.log")

    async def ended(self) -> int:
        return self.code


def night_in(cycles_dir: Path, code: int = 0) -> Night:
    return Night(Ended(code), cycles_dir, frozenset({"20200101T000000Z"}))  # type: ignore[arg-type]


def cycle_until(cycles_dir: Path, last: str) -> Path:
    """A cycle of which every step until `last` has left its file."""
    says = {"gate": {"verdict": "pass"}, "roll_out": {"result": "promoted"}}
    for name, (_, output) in records.STEPS.items():
        put(cycles_dir / CYCLE / output, says.get(name, {}))
        if name == last:
            break
    return cycles_dir / CYCLE


def test_the_night_is_followed_by_the_files_that_its_steps_leave(tmp_path: Path) -> None:
    running = night_in(tmp_path)
    (tmp_path / "20200101T000000Z").mkdir()
    assert (running.step, running.cycle_dir) == ("starting Airflow", None)
    cycle_dir = tmp_path / CYCLE
    cycle_dir.mkdir()
    seen = [running.step]
    for name in records.STEPS:
        cycle_until(tmp_path, name)
        seen.append(running.step)
    assert seen == [*records.STEPS, "report"]
    put(cycle_dir / "manifest.json", {})
    assert (running.step, running.cycle_dir) == ("ending", cycle_dir)


def test_a_candidate_that_did_not_pass_is_not_waited_for(tmp_path: Path) -> None:
    cycle_dir = cycle_until(tmp_path, "register")
    put(cycle_dir / "gate.json", {"verdict": "inconclusive"})
    assert night_in(tmp_path).step == "report"
    assert night.verdict(cycle_dir) == "inconclusive"
    assert night.verdict(tmp_path) == ""


async def test_a_snapshot_that_was_refused_fails_the_night_at_its_validation(tmp_path: Path) -> None:
    cycle_dir = cycle_until(tmp_path, "validate")
    put(cycle_dir / "steps/validate.json", {"outcome": "failed", "reason": "too many bad rows"})
    put(cycle_dir / "manifest.json", {})
    with pytest.raises(LinkError, match=r"step validate: .*exit code 1: too many bad rows"):
        await night_in(tmp_path, code=1).ended(new_questions=320)


def too_little(tmp_path: Path) -> Path:
    cycle_dir = cycle_until(tmp_path, "curate")
    put(cycle_dir / "dataset/dataset.json", {"enough": False, "reason": "5 new training examples, 32 needed"})
    put(cycle_dir / "steps/curate.json", {"outcome": "done", "reason": ""})
    return cycle_dir


async def test_a_night_that_few_new_questions_teach_too_little_is_skipped_with_its_reason(
    tmp_path: Path,
) -> None:
    cycle_dir = too_little(tmp_path)
    running = night_in(tmp_path)
    assert running.step == "report"
    assert await running.ended(new_questions=7) == cycle_dir
    skipped = night.skipped(cycle_dir)
    assert skipped is not None
    assert (skipped.name, skipped.reason) == ("curate", "5 new training examples, 32 needed")


async def test_a_night_that_many_new_questions_teach_too_little_is_a_broken_link(tmp_path: Path) -> None:
    too_little(tmp_path)
    with pytest.raises(LinkError, match=r"step curate: .*nothing to learn.*: 5 new training examples"):
        await night_in(tmp_path).ended(new_questions=night.PLENTY_OF_QUESTIONS)


async def test_a_night_that_finds_an_empty_log_is_a_broken_link(tmp_path: Path) -> None:
    put(tmp_path / CYCLE / "steps/freeze.json", {"outcome": "skipped", "reason": "nothing was stored"})
    with pytest.raises(LinkError, match=r"step freeze: .*nothing was stored"):
        await night_in(tmp_path).ended(new_questions=0)


async def test_a_night_that_leaves_no_cycle_is_a_broken_link(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="starting Airflow"):
        await night_in(tmp_path).ended(new_questions=0)


def test_a_canarys_share_goes_back_to_the_stable_version_and_shadows_stay() -> None:
    stable, shadow = Target("m:base", "stable", 50), Target("m:2", "shadow", 30)
    assert without_canary([stable, Target("m:1", "canary", 50), shadow]) == (
        Target("m:base", "stable", 100),
        shadow,
    )
    assert without_canary([Target("m:base", "stable", 100)]) == (Target("m:base", "stable", 100),)


def test_a_private_file_is_only_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "demo" / "operator.token"
    write_private(path, "al_1")
    write_private(path, "al_2")
    assert path.read_text() == "al_2\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def plan_in(tmp_path: Path) -> Plan:
    return Plan(tmp_path / "var", tmp_path / "cycles", tmp_path / "base.gguf")


def test_a_model_version_leads_back_to_the_file_it_was_made_from(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    assert gguf_of(plan, "m:base") == tmp_path / "base.gguf"
    assert gguf_of(plan, "m:20260101T000000Z") == tmp_path / "cycles/20260101T000000Z/model.gguf"


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.serving.FREE_GIB", 10**6)
    with pytest.raises(LinkError, match="GiB are free"):
        assemble_model(tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_assembled_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, overwrite: bool) -> None:
        path.write_bytes(b"half")
        raise ValueError("sha256 did not match")

    monkeypatch.setattr("demo.serving.assemble", fail)
    with pytest.raises(LinkError, match="sha256 did not match"):
        assemble_model(tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_make_serve_assembles_the_model_in_the_same_way() -> None:
    target = "var/models/none.gguf"
    told = subprocess.run(
        ["make", "--dry-run", f"BASE={target}", target], cwd=HOME, capture_output=True, text=True, check=True
    )
    assert "demo.serving.assemble_model" in told.stdout


def test_a_model_that_is_there_is_not_assembled_again(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assemble_model(tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"GGUF"


def test_every_part_is_told_the_same_places(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    assert plan.environment["AGENTLOOP_STATE_DIR"] == str(tmp_path / "var")
    assert plan.environment["AGENTLOOP_ENGINE"] == "embedded"
    assert (HOME / "scripts" / "night.py").is_file()


async def test_without_a_terminal_a_line_now_and_then_shows_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("demo.screen.QUIET_SECONDS", 0)
    console = Console(file=io.StringIO(), width=20)
    screen = Screen(console, started=0)
    described = asyncio.Event()

    def describe() -> str:
        described.set()
        return "in the middle of something that is longer than a line [1]"

    async with screen.watching(describe):
        await described.wait()
    assert "in the middle of something that is longer than a line [1]\n" in console.file.getvalue()  # type: ignore[attr-defined]


async def test_in_a_terminal_a_live_line_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.screen.REDRAW_SECONDS", 0)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    calls = []
    enough = asyncio.Event()

    def describe() -> str:
        calls.append(1)
        if len(calls) > 2:
            enough.set()
        return "asking"

    async with Screen(console).watching(describe):
        await enough.wait()
    assert "asking" in console.file.getvalue()  # type: ignore[attr-defined]
