"""What would a model version answer to past traffic? Asks it a cycle's requests, beside the answers then.

The requests are those of the cycle's snapshot that were answered; the server is one of its own, as evaluation
has it, so that nothing enters the log. What is written quotes callers, and lies under the state folder, where
an erasure deletes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from grpc_server.domain.plain import message_from_plain, message_to_plain, raw_prompt, request_from_plain
from grpc_server.domain.types import ChatRequest, Message, Role, Sampling
from training import cycle, subjects, suites
from training.asking import REFUSED, Answer, Question, ask_all, key
from training.evaluate import until_stopped
from training.own_server import generator
from training.scoring import matches
from training.statistics import paired_difference
from training.subjects import Place
from training.suites import Item
from training.watching import Progress

FOLDER = "replay"
COLUMNS = (
    "inference_id",
    "session_id",
    "model_version",
    "request_json",
    "answer_json",
    "status",
    "finish_reason",
    "output_tokens",
    "total_ms",
    "feedback_json",
)
CANNOT_TELL = (
    "Callers would have gone on otherwise: each request is asked as it came then, after the old model's own"
    " turns. What a conversation would have become with this model is not known (the comparison is"
    " off-policy).",
    "Nobody has judged the new answers. Agreement with demonstrations is known only where a caller showed"
    " one, which callers do where the old answer was wrong: its share of right answers looks worse than it"
    " was.",
    "The old answers may have been sampled; the new ones are greedy. Some of the answers that differ would"
    " differ from one call to the next of the same model.",
    "If the model learned from these very requests, it has seen what was shown for them: agreement is then"
    " memory, not skill. `agent-loop lineage` tells.",
    "Latencies were measured at other times, on a server with another load: compare orders of magnitude.",
    "Only requests that were answered are asked: what was refused, cancelled or failed then is left out.",
)
"""What such a comparison does not show, for every reader of its figures."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One past request, what was answered, and what was demonstrated for it, if anything was."""

    inference_id: str
    session_id: str
    model_version: str
    request: ChatRequest = field(repr=False)
    answer: Message = field(repr=False)
    finish_reason: str
    output_tokens: int
    latency_ms: float
    demonstration: Message | None = field(repr=False)


def run(
    directory: Path, place: Place, model_version: str, *, limit: int = 1000, progress: Progress
) -> dict[str, Any]:
    """Ask `model_version` a cycle's requests; write answers.jsonl and summary.json; return the summary.

    Of more than `limit` requests those with the least hash of their id are asked: the same each time.

    Raises:
        FileNotFoundError: if the cycle has no snapshot.
        UnknownModelError: if the version's GGUF is not here.
        ValueError: if there is no request to ask.
        own_server.ServerFailedError: if the server of its own fails.
    """
    subject = subjects.version(model_version, place)
    left_out: Counter[str] = Counter()
    past = chosen(directory / "snapshot" / "inferences.parquet", limit, left_out)
    if not past:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "it is empty"
        raise ValueError(f"the snapshot of {directory.name} has no request that can be asked: {reasons}")
    made_by = generator(place.engine)
    questions = [_question(each, subject, made_by) for each in past]
    config = suites.read_config()
    answers = asyncio.run(until_stopped(ask_all(questions, config, place, progress)))
    lines = [compared(each, answers[one.key]) for each, one in zip(past, questions, strict=True)]
    output = place.state_dir / FOLDER / directory.resolve().name / model_version.replace(":", "-")
    found = {
        "cycle_id": directory.resolve().name,
        "model_version": model_version,
        "model_sha256": subject.sha256,
        "made_by": made_by,
        "left_out": dict(left_out),
        **summary(lines),
        "answers": str(output / "answers.jsonl"),
        "cannot_tell": list(CANNOT_TELL),
    }
    with cycle.new_directory(output) as building:
        with (building / "answers.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
        cycle.write_json(building / "summary.json", found)
    return found


def forget(state_dir: Path) -> None:
    """Delete every replay that is kept: they quote callers."""
    shutil.rmtree(state_dir / FOLDER, ignore_errors=True)


# What is asked.


def chosen(snapshot: Path, limit: int, left_out: Counter[str]) -> list[Asked]:
    """At most `limit` of the snapshot's requests, in order of time; why others are not is counted."""
    found = heapq.nsmallest(limit, _askable(snapshot, left_out), key=lambda one: _drawn(one.inference_id))
    return sorted(found, key=lambda one: one.inference_id)


def _drawn(inference_id: str) -> bytes:
    return hashlib.sha256(inference_id.encode()).digest()


def _askable(snapshot: Path, left_out: Counter[str]) -> Iterator[Asked]:
    from pyarrow import parquet

    with parquet.ParquetFile(snapshot) as file:
        for batch in file.iter_batches(batch_size=1000, columns=list(COLUMNS)):
            for row in batch.to_pylist():
                one = asked(row)
                if isinstance(one, str):
                    left_out[one] += 1
                else:
                    yield one


def asked(row: Mapping[str, Any]) -> Asked | str:
    """A snapshot's row (with COLUMNS) as what can be asked again, or why it cannot."""
    if row["status"] != "ok":
        return "not_answered"
    try:
        plain = json.loads(row["request_json"])
        if raw_prompt(plain) is not None:
            return "raw_prompt"
        request = request_from_plain(plain)
        answer = message_from_plain(json.loads(row["answer_json"]))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return "unreadable"
    return Asked(
        inference_id=str(row["inference_id"]),
        session_id=str(row["session_id"] or ""),
        model_version=str(row["model_version"] or ""),
        request=replace(request, sampling=_greedy(request.sampling)),
        answer=answer,
        finish_reason=str(row["finish_reason"] or ""),
        output_tokens=int(row["output_tokens"] or 0),
        latency_ms=float(row["total_ms"] or 0.0),
        demonstration=demonstrated(row["feedback_json"]),
    )


def _greedy(drawn: Sampling) -> Sampling:
    return Sampling(0.0, max_tokens=drawn.max_tokens, seed=0, stop=drawn.stop)


def demonstrated(feedback_json: str | None) -> Message | None:
    """The latest demonstration that is an answer."""
    try:
        said = [one for one in json.loads(feedback_json or "[]") if one.get("demonstration")]
        said.sort(key=lambda one: (str(one.get("created_at")), str(one.get("id"))), reverse=True)
        shown = [message_from_plain(one["demonstration"]) for one in said]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None
    return next((one for one in shown if one.role is Role.ASSISTANT), None)


def _question(one: Asked, subject: subjects.Subject, made_by: Mapping[str, str]) -> Question:
    item = Item(one.inference_id, one.session_id, one.request, lambda _: False, "")
    return Question(FOLDER, item, subject, one.request, key(subject, one.request, made_by))


# What came of it. Pure from here on.


def compared(one: Asked, answer: Answer) -> dict[str, Any]:
    """One line: the answer then and now, whether they say the same, and which is what was demonstrated."""
    now = message_from_plain(answer["answer"])
    shown = one.demonstration
    return {
        "inference_id": one.inference_id,
        "session_id": one.session_id,
        "then": {
            "model_version": one.model_version,
            "answer": message_to_plain(one.answer),
            "finish_reason": one.finish_reason,
            "output_tokens": one.output_tokens,
            "latency_ms": one.latency_ms,
            "right": None if shown is None else matches(one.answer, shown),
        },
        "now": {
            "answer": answer["answer"],
            "finish_reason": answer["finish_reason"],
            "output_tokens": answer["output_tokens"],
            "latency_ms": answer["latency_ms"],
            "right": None if shown is None else matches(now, shown),
        },
        "same": now == one.answer or matches(now, one.answer),
        "demonstration": None if shown is None else message_to_plain(shown),
    }


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares, lengths (tokens), latencies (ms) and tool names of both sides; refused requests apart."""
    given = [line for line in lines if line["now"]["finish_reason"] != REFUSED]
    return {
        "requests": len(lines),
        "refused_now": len(lines) - len(given),
        "same": sum(line["same"] for line in given),
        "same_share": fmean(line["same"] for line in given) if given else None,
        "demonstrated": _agreement([line for line in given if line["demonstration"] is not None]),
        "then": _side(given, "then"),
        "now": _side(given, "now"),
        "answered_then_by": dict(Counter(line["then"]["model_version"] for line in given)),
    }


def _agreement(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many answers are what callers demonstrated, and the difference with its 95 % interval."""
    if not lines:
        return {"n": 0, "then": 0, "now": 0, "difference": None, "ci_low": None, "ci_high": None}
    then, now = ([bool(line[side]["right"]) for line in lines] for side in ("then", "now"))
    found = paired_difference(then, now, [line["session_id"] or line["inference_id"] for line in lines])
    return {
        "n": len(lines),
        "then": sum(then),
        "now": sum(now),
        "difference": found.difference,
        "ci_low": found.interval.low,
        "ci_high": found.interval.high,
    }


def _side(lines: Sequence[Mapping[str, Any]], side: str) -> dict[str, Any]:
    answers = [line[side] for line in lines]
    calls = Counter(call["name"] for one in answers for call in one["answer"].get("tool_calls", ()))
    return {
        "output_tokens_mean": fmean(one["output_tokens"] for one in answers) if answers else None,
        "latency_ms_median": median(one["latency_ms"] for one in answers) if answers else None,
        "cut_share": fmean(one["finish_reason"] == "length" for one in answers) if answers else None,
        "finish_reasons": dict(Counter(one["finish_reason"] for one in answers)),
        "tools": dict(calls.most_common(50)),
    }


def told(found: Mapping[str, Any]) -> str:
    """The summary in words, with what it cannot tell."""
    then, now, shown = found["then"], found["now"], found["demonstrated"]
    lines = [
        f"{found['requests']} requests of {found['cycle_id']}, asked again of {found['model_version']}"
        f" ({found['refused_now']} refused)",
        f"same answer: {found['same']} ({_percent(found['same_share'])})",
        f"as demonstrated: then {shown['then']}, now {shown['now']} of {shown['n']}{_interval(shown)}",
        f"output tokens, mean: then {_number(then['output_tokens_mean'])},"
        f" now {_number(now['output_tokens_mean'])}",
        f"latency, median: then {_number(then['latency_ms_median'])} ms,"
        f" now {_number(now['latency_ms_median'])} ms",
        f"cut at max_tokens: then {_percent(then['cut_share'])}, now {_percent(now['cut_share'])}",
        "tools called, then and now:",
    ]
    names = sorted({*then["tools"], *now["tools"]})
    lines += [f"  {name}: {then['tools'].get(name, 0)}, {now['tools'].get(name, 0)}" for name in names[:20]]
    lines += [f"  and {len(names) - 20} more"] * (len(names) > 20)
    lines += [f"side by side: {found['answers']}", "", "What this comparison cannot tell:"]
    return "\n".join([*lines, *(f"- {each}" for each in found["cannot_tell"])])


def _interval(shown: Mapping[str, Any]) -> str:
    if shown["difference"] is None:
        return ""
    return f" ({shown['difference']:+.3f}, 95 % interval {shown['ci_low']:+.3f} to {shown['ci_high']:+.3f})"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"
