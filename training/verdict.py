"""A night in one sentence, and what is to be done about it now."""

from __future__ import annotations

from dataclasses import dataclass
from shlex import quote
from typing import Any, Literal

from agentloop.cycle_summary import judged
from agentloop.night import Night, Step

Tone = Literal["good", "held", "bad", "quiet"]

_BY_HAND = {"freeze": "validation freeze", "validate": "validation check"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The night in a sentence, its colour, the reason, what to do now, and the command for it, if any."""

    tone: Tone
    headline: str
    because: str
    now: str
    command: str = ""


def verdict(night: Night) -> Verdict:
    """What the night came to."""
    stopped = night.stopped
    if stopped is not None and stopped.name == "roll_out":
        return _not_rolled_out(stopped)
    if stopped is not None:
        return _skipped(stopped) if stopped.state == "skipped" else _failed(night, stopped)
    if not night.gate:
        return Verdict("quiet", "This night has not begun.", "", "Nothing: it is written again at its end.")
    if night.rollout:
        return _promoted(night) if night.rollout.get("result") == "promoted" else _rolled_back(night)
    return _held(night)


def _promoted(night: Night) -> Verdict:
    share, former = accuracy(night, "candidate"), accuracy(night, "champion")
    headline = "A better model serves since this night."
    if share and former:
        headline = (
            f"A better model serves: it answers {share['correct']} of {share['n']} questions right,"
            f" the former champion {former['correct']}."
        )
    if night.unlearn:
        headline = "A model that never learned what was erased serves now."
    return Verdict(
        "good",
        headline,
        night.gate.get("reason", ""),
        "Nothing. Should callers complain, this, in the checkout, puts the former champion back:",
        # make reads a doubled $ as one
        "make rollback CYCLE=" + quote(str(night.directory).replace("$", "$$")),
    )


def _rolled_back(night: Night) -> Verdict:
    return Verdict(
        "held",
        "The candidate passed the gate, but not its trial on live traffic: the former champion serves on.",
        night.rollout.get("reason", ""),
        "Nothing is broken. Compare the two versions' figures under Rollout; the rows count as learned.",
    )


def _held(night: Night) -> Verdict:
    if night.gate.get("verdict") == "fail":
        headline = "The candidate was rejected: the champion serves on."
        now = "Nothing is broken. If it happens again, look at the answers that got worse, below."
    else:
        headline = "The candidate is not shown to be better: the champion serves on."
        now = "Nothing. More feedback, or more questions, as many as the reason says, decide such a night."
    return Verdict("held", headline, night.gate.get("reason", ""), now)


def _skipped(step: Step) -> Verdict:
    return Verdict(
        "quiet",
        "There was nothing to learn tonight: the champion serves on.",
        step.reason,
        "Nothing. What was logged waits for the next night.",
    )


def _failed(night: Night, step: Step) -> Verdict:
    failed = step.state == "failed"
    command = _BY_HAND.get(step.name, f"training {step.name}")
    now = (
        f"Put right what the reason names, then clear the task {step.name} in Airflow, or run the step"
        " by hand, in the checkout. Steps that had finished do nothing again."
    )
    if step.name == "validate" and night.validation:
        now = f"Open validation/data_docs/index.html to see which rows and why. {now}"
    return Verdict(
        "bad",
        f"The night {'failed' if failed else 'stopped'} at {step.title.lower()}: the champion serves on.",
        step.reason,
        now,
        f".venv/bin/python -m {command} --cycle {quote(str(night.directory))}",
    )


def _not_rolled_out(step: Step) -> Verdict:
    return Verdict(
        "bad",
        "The candidate passed the gate, but its rollout did not end.",
        step.reason,
        "See (in the checkout) what serves, then clear the task roll_out: it goes on where it stopped.",
        ".venv/bin/agent-loop route get",
    )


def accuracy(night: Night, subject: str) -> dict[str, Any] | None:
    """A subject's figures on the suite that the gate's first check judges."""
    _, subjects = judged(night)
    found = subjects.get(subject)
    return found if isinstance(found, dict) else None
