"""The page of the morning: whatever the night came to, it says so, with the reason and what to do."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentloop.night import Night
from tests.integration.night_by_hand import CANDIDATE, make
from training import bfcl, changed_answers, cycle, report
from training.__main__ import app
from training.verdict import verdict


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.loads: list[str] = []
        self._silent = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent = tag == "style"
        if tag in ("script", "img", "iframe", "link", "object", "embed", "video"):
            self.loads.append(tag)

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.said.append(data)


def text_of(page: Path) -> str:
    """What a reader sees of a page, in a line."""
    parser = _Text()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.loads == [], "the page loads nothing"
    return " ".join(" ".join(parser.said).split())


def test_a_night_that_promoted_tells_it_from_the_verdict_to_the_examples(tmp_path: Path) -> None:
    text = text_of(report.run(make(tmp_path)))
    assert "A better model serves: it answers 37 of 100 questions right, the former champion 0." in text
    assert "make rollback CYCLE=" in text
    for figure in ("230", "37 %", "from 2.08", "253 MB", "5.1 GB", "13 min", "02:00 to 02:14 UTC"):
        assert figure in text
    assert "(28 % to 46 %), 37 of 100" in text, "accuracy with its interval"
    assert "+0.370 0.280 to 0.470 holds" in text, "the gate's check"
    assert "no demonstration 22" in text, "excluded by reason"
    assert "259 of 262 rows accepted, 3 in quarantine" in text
    assert "131 requests were answered meanwhile, 0 failed" in text
    assert "Better 10 of 53" in text and "Worse 1 of 1" in text
    assert CANDIDATE["sha256"] in text


def test_examples_show_the_question_what_was_expected_and_both_answers_escaped(tmp_path: Path) -> None:
    page = report.run(make(tmp_path)).read_text(encoding="utf-8")
    assert "Will it rain in town 37 &lt;b&gt;tomorrow&lt;/b&gt;?" in page
    assert "The &lt;script&gt;alert(1)&lt;/script&gt; weather is very" in page
    assert "<script" not in page
    assert bfcl.item("simple_python_200").messages[-1].content in unescape(page)


def test_an_item_of_a_leaderboard_that_is_not_installed_is_named_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(item_id: str) -> bfcl.Item:
        raise bfcl.DataNotInstalledError(item_id)

    monkeypatch.setattr(bfcl, "item", gone)
    assert "simple python, simple_python_200" in text_of(report.run(make(tmp_path)))


@pytest.mark.parametrize(
    ("made", "tone", "headline", "now"),
    [
        ({"rolled": "rolled_back"}, "held", "not its trial on live traffic", "Nothing is broken"),
        ({"rolled": "not_started"}, "bad", "its rollout did not end", "clear the task roll_out"),
        ({"until": "register"}, "bad", "its rollout did not end", ".venv/bin/agent-loop route get"),
        ({"until": "register", "verdict": "fail"}, "held", "rejected: the champion serves", "Nothing is"),
        ({"until": "register", "verdict": "inconclusive"}, "held", "not shown to be better", "More feedback"),
        ({"until": "curate"}, "bad", "stopped at fine-tuning", "training finetune --cycle"),
        ({"until": "freeze"}, "bad", "stopped at validation", "validation check --cycle"),
    ],
)
def test_every_end_of_a_night_has_its_sentence_and_what_to_do(
    tmp_path: Path, made: dict[str, str], tone: str, headline: str, now: str
) -> None:
    directory = make(tmp_path, **made)
    found = verdict(Night(directory))
    assert found.tone == tone
    assert headline in found.headline
    assert now in f"{found.now} {found.command}"
    assert found.headline in text_of(report.run(directory))


def test_a_night_with_nothing_to_learn_is_no_failure(tmp_path: Path) -> None:
    directory = make(tmp_path, until="curate")
    record = cycle.read_json(directory / "dataset" / "dataset.json")
    record |= {"enough": False, "reason": "12 new training examples, 32 needed"}
    cycle.write_json(directory / "dataset" / "dataset.json", record)
    found = verdict(Night(directory))
    assert (found.tone, found.because) == ("quiet", "12 new training examples, 32 needed")
    assert "skipped 12 new training examples" in text_of(report.run(directory))


def test_an_empty_log_is_told_though_there_is_only_the_steps_note(tmp_path: Path) -> None:
    directory = tmp_path / "20260131T020000Z"
    note = {"outcome": "skipped", "reason": "nothing was stored since the last verdict", "seconds": 0.2}
    note |= {"started_at": "2026-01-31T02:00:05+00:00", "peak_memory_gb": 0.1}
    cycle.write_json(directory / "steps" / "freeze.json", note)
    text = text_of(report.run(directory))
    assert "There was nothing to learn tonight: the champion serves on. nothing was stored since" in text


def test_a_failed_step_is_shown_with_its_reason_and_the_rest_as_not_reached(tmp_path: Path) -> None:
    directory = make(tmp_path, until="curate")
    note = cycle.read_json(directory / "steps" / "curate.json")
    note |= {"outcome": "failed", "reason": "ValueError: loss is not finite at step 37"}
    cycle.write_json(directory / "steps" / "finetune.json", note)
    states = {step.name: step.state for step in Night(directory).steps}
    assert (states["curate"], states["finetune"], states["quantize"]) == ("done", "failed", "not_reached")
    text = text_of(report.run(directory))
    assert "The night failed at fine-tuning: the champion serves on. ValueError: loss is not finite" in text


def test_a_refused_snapshot_sends_the_reader_to_the_data_docs(tmp_path: Path) -> None:
    directory = make(tmp_path, until="validate")
    record = cycle.read_json(directory / "validation" / "result.json")
    cycle.write_json(
        directory / "validation" / "result.json", record | {"success": False, "reason": "failure_share"}
    )
    note = cycle.read_json(directory / "steps" / "validate.json")
    cycle.write_json(
        directory / "steps" / "validate.json", note | {"outcome": "failed", "reason": "failure_share"}
    )
    page = report.run(directory)
    assert "Open validation/data_docs/index.html" in text_of(page)
    assert 'href="validation/data_docs/index.html"' in page.read_text(encoding="utf-8")


def test_a_step_that_was_killed_is_told_from_one_that_never_began(tmp_path: Path) -> None:
    directory = make(tmp_path, until="curate")
    (directory / "steps" / ".finetune.lock").touch()
    step = Night(directory).stopped
    assert step is not None
    assert (step.name, step.state, "killed" in step.reason) == ("finetune", "unfinished", True)


def test_files_that_cannot_be_read_are_named_and_the_rest_is_told(tmp_path: Path) -> None:
    directory = make(tmp_path)
    (directory / "quantize.json").write_text("{")
    with (directory / "adapter" / "training.jsonl").open("a") as file:
        file.write('{"step": 97, "lo')
    text = text_of(report.run(directory))
    assert "quantize.json cannot be read: Expecting property name" in text
    assert "adapter/training.jsonl, line 97, is no JSON object" in text
    assert "it answers 37 of 100" in text


def test_the_demo_adds_its_figures(tmp_path: Path) -> None:
    directory = make(tmp_path)
    targets = [{"model_version": "gemma-3-270m:base", "role": "stable", "weight": 100}]
    shown = {
        "requests": 262,
        "ttft_p50_ms": 38.25,
        "champion_accuracy": None,
        "champion_accuracy_ci": [0.28, 0.46],
        "route_before": targets,
        "examples_excluded": {"duplicate": 4, "barred": 0},
    }
    cycle.write_json(directory / "demo.json", shown)
    text = text_of(report.run(directory))
    assert "ttft p50 ms 38.25" in text
    assert "gemma-3-270m:base (stable 100 %)" in text
    assert "duplicate 4" in text


def test_the_manifest_comes_last_and_names_every_file_by_its_hash(tmp_path: Path) -> None:
    directory = make(tmp_path)
    page = report.run(directory)
    manifest = json.loads((directory / cycle.MANIFEST).read_text())
    assert manifest["files"]["report.html"]["sha256"] == hashlib.sha256(page.read_bytes()).hexdigest()
    assert set(manifest["steps"]) >= {"freeze", "finetune", "report"}
    written = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    assert max(written, key=lambda path: written[path]).name == cycle.MANIFEST


def test_a_second_report_changes_nothing_until_the_night_has_more_to_tell(tmp_path: Path) -> None:
    directory = make(tmp_path, until="register")
    page = report.run(directory)
    written = page.stat().st_mtime_ns
    assert report.run(directory).stat().st_mtime_ns == written
    (directory / cycle.MANIFEST).unlink()
    report.run(directory)
    assert (directory / cycle.MANIFEST).is_file()
    cycle.write_json(directory / "demo.json", {"requests": 262})
    assert "The demo's figures" in text_of(report.run(directory))


def test_the_command_prints_where_the_page_is(tmp_path: Path) -> None:
    directory = make(tmp_path)
    done = CliRunner().invoke(app, ["report", "--cycle", str(directory)])
    assert (done.exit_code, done.stdout.strip()) == (0, str(directory / "report.html"))
    lost = CliRunner().invoke(app, ["report", "--cycle", str(tmp_path / "nowhere")])
    assert (lost.exit_code, "there is no cycle" in lost.stderr) == (1, True)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.42, "0.4 s"), (58.4, "58 s"), (322, "5 min 22 s"), (7500, "2 h 5 min"), (None, "")],
)
def test_durations_are_for_a_reader(seconds: float | None, said: str) -> None:
    assert report.duration(seconds) == said


def test_figures_are_for_a_reader() -> None:
    shown = [report.number(each) for each in (None, 0.0, 1410.0, 0.0213, 1234567, "ok", True)]
    assert shown == ["\N{EN DASH}", "0", "1410", "0.021", "1,234,567", "ok", "True"]
    assert changed_answers.said({"content": " ", "tool_calls": []}) == "(nothing)"
    assert changed_answers.shortened("a\x00b\n c") == "a\N{REPLACEMENT CHARACTER}b c"
    assert len(changed_answers.shortened("x" * 500)) == 160


CHROMIUM = (
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def test_a_browser_lays_the_page_out_within_its_width(tmp_path: Path) -> None:
    """Chromium prints the page to PDF without an error, and its DOM still ends with the footer."""
    page = report.run(make(tmp_path / "a night & its page"))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    seen = subprocess.run(
        [*CHROMIUM, profile, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert seen.returncode == 0, seen.stderr
    assert re.search(r"<footer>.*manifest\.json.*</footer>", seen.stdout, re.DOTALL)
    assert seen.stdout.count("<svg") == 2
