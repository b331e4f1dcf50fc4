"""What a new colour must show before it gets callers, and while it has them."""

from __future__ import annotations

import itertools
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.ansible_modules import server_probe, server_watch
from tests.certificates import Authority
from tests.module_run import run_module

ENDS = "agentloop_inferences_total"


def good(prompt: str) -> str:
    return "m:base"


def bad(prompt: str) -> str:
    raise TimeoutError("no answer")


def probed(*seconds: float) -> Any:
    return server_probe.Probed(list(seconds))


def test_servers_are_asked_in_turn_and_warmed_before_they_are_measured() -> None:
    clock = itertools.count().__next__
    new, old = server_probe.probe([good, good], ["one", "two"], 1, clock)
    assert new.plain() == {"answered": 2, "failed": [], "median_seconds": 1, "model_versions": ["m:base"]}
    assert old.seconds == [1, 1]


def test_a_request_without_an_answer_keeps_a_new_colour_out_even_while_it_is_warmed() -> None:
    answers = iter([bad, good, good])
    (new,) = server_probe.probe([lambda prompt: next(answers)(prompt)], ["one", "two"], 1)
    assert new.failed == ["TimeoutError: no answer"]
    assert server_probe.verdict(new, None, 2, 2).startswith(
        "it left 1 requests unanswered; the first: Timeout"
    )


@pytest.mark.parametrize(("seconds", "kept_out"), [(2.9, False), (3.1, True)])
def test_a_new_colour_may_be_slower_within_bounds(seconds: float, kept_out: bool) -> None:
    why = server_probe.verdict(probed(seconds), probed(1.0), 2.0, 1.0)
    assert bool(why) == kept_out
    assert not kept_out or "with the serving colour's 1.00 s it may be 3.00 s" in why


def test_a_serving_colour_that_answers_nothing_bars_no_new_one() -> None:
    assert server_probe.verdict(probed(9.0), probed(), 2, 2) == ""


def test_the_probe_asks_through_the_client_and_fails_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("al_x")
    options = {"server": "grpc://127.0.0.1:1", "token_file": str(tmp_path / "token"), "timeout": 0.2}
    failed = run_module(server_probe, {**options, "prompts": ["one"], "against": "grpc://127.0.0.1:1"})
    assert failed["msg"].startswith("grpc://127.0.0.1:1 must not serve: it left 2 requests unanswered")
    assert len(failed["against"]["failed"]) == 2
    assert run_module(server_probe, options, check=True)["server"]["answered"] == 0
    assert "prompts is empty" in run_module(server_probe, {**options, "prompts": []})["msg"]
    wrong = run_module(server_probe, {**options, "server": "http://a"})
    assert "it must be host:port" in wrong["msg"]


def ends(**by_status: float) -> dict[Any, float]:
    return {(ENDS, (("alias", "default"), ("status", status))): count for status, count in by_status.items()}


class Scrapes:
    """Metrics, one scrape after the other; an error stands for no answer. Then the last again and again."""

    def __init__(self, *scrapes: dict[Any, float] | OSError) -> None:
        self.scrapes = list(scrapes)

    def __call__(self) -> dict[Any, float]:
        now = self.scrapes.pop(0) if len(self.scrapes) > 1 else self.scrapes[0]
        if isinstance(now, OSError):
            raise now
        return now


def watched(*scrapes: dict[Any, float] | OSError, share: float = 0.02) -> tuple[int, int, str]:
    clock = itertools.count().__next__
    found: tuple[int, int, str] = server_watch.watch(
        Scrapes(*scrapes), 5, 1, share, clock=clock, sleep=lambda _: None
    )
    return found


def test_a_colour_that_answers_goes_on_serving() -> None:
    assert watched(ends(ok=5), ends(ok=50, cancelled=3)) == (45, 0, "")


def test_without_requests_it_goes_on_serving() -> None:
    assert watched({}) == (0, 0, "")


def test_failures_from_before_the_switch_do_not_count() -> None:
    assert watched(ends(ok=1, error=9), ends(ok=4, error=9)) == (3, 0, "")


def test_failures_end_the_watch_at_once() -> None:
    assert watched(ends(ok=0), ends(ok=10, error=1)) == (11, 1, "1 of 11 requests failed")
    assert watched(ends(ok=0), ends(ok=10, error=1), share=0.1)[2] == ""


def test_one_missed_look_is_forgiven_and_two_are_not() -> None:
    assert watched(ends(ok=1), OSError("reset"), ends(ok=3)) == (2, 0, "")
    assert watched(ends(ok=1), OSError("reset"), OSError("refused"))[2] == "it does not answer: refused"


def test_the_watch_reads_metrics_and_says_why_it_failed(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(Authority("a").pem)
    options = {"metrics_url": "https://127.0.0.1:1/metrics", "ca_file": str(tmp_path / "ca.crt")}
    failed = run_module(server_watch, {**options, "poll_interval": 0.01})
    assert failed["msg"].startswith("https://127.0.0.1:1/metrics must not go on serving: it does not answer")
    assert run_module(server_watch, options, check=True)["changed"] is False
    with pytest.raises(ssl.SSLError):
        (tmp_path / "ca.crt").write_text("none")
        server_watch.fetch("https://127.0.0.1:1/", ca_file=str(tmp_path / "ca.crt"))
