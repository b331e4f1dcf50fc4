"""How much of whom is learned: a night's caps, the room of the dataset, and the weight of each example."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from training.curation_rules import Balance, Rules
from training.lessons import Lesson, Line

T = TypeVar("T")

TOOLS_SHOWN = 50


def within_caps(lessons: Sequence[Lesson], rules: Rules) -> tuple[list[Lesson], dict[str, list[Lesson]]]:
    """The lessons that a night may take of each session and caller, and the others by reason."""
    over: dict[str, list[Lesson]] = {"over_session_cap": [], "over_caller_cap": []}
    by_session = _grouped(lessons, lambda one: one.session_id and f"{one.caller} {one.session_id}")
    left: list[Lesson] = []
    for session, own in by_session.items():
        taken = fairly(own, rules.session_per_night if session else len(own), [_source, _tool])
        left += taken
        over["over_session_cap"] += _without(own, taken)
    kept: list[Lesson] = []
    for own in _grouped(sorted(left, key=_id), lambda one: one.caller).values():
        taken = fairly(own, rules.caller_per_night, [_source, _tool, _session])
        kept += taken
        over["over_caller_cap"] += _without(own, taken)
    return sorted(kept, key=_id), over


def with_room(old: Sequence[Line], new: Sequence[Lesson], rules: Rules) -> tuple[list[Line], list[Lesson]]:
    """What of older nights and of this one fits in the dataset.

    Older nights have `replay_share` of the cap, this one the rest; what one leaves, the other takes. Of older
    nights each gets an equal part, then each caller; of this one each caller, then each tool.
    """
    kept_for_old = max(int(rules.cap * rules.replay_share), rules.cap - len(new))
    replayed = fairly(old, kept_for_old, [_line_source, _key("cycle"), _key("caller"), _key("tool")])
    taken = fairly(new, rules.cap - len(replayed), [_source, lambda one: one.caller, _tool])
    return replayed, taken


def fairly(items: Sequence[T], room: int, keys: Sequence[Callable[[T], str]]) -> list[T]:
    """At most `room` of items that are in order of time: equal parts by the first key, in these by the next.

    What a group leaves, others take. Without a key the newest are taken; the key `_source` is a rank:
    demonstrations have all the room that they need, liked answers what is left.
    """
    if len(items) <= room:
        return list(items)
    if room <= 0:
        return []
    if not keys:
        return list(items[-room:])
    key, *rest = keys
    groups = _grouped(items, key)
    if key in (_source, _line_source):
        shares = _ranked({name: len(group) for name, group in groups.items()}, room)
    else:
        shares = equal_parts({name: len(group) for name, group in groups.items()}, room)
    return [one for name, group in groups.items() for one in fairly(group, shares[name], rest)]


def equal_parts(counts: Mapping[str, int], room: int) -> dict[str, int]:
    """Of each name at most its count, together at most `room`, and the least as great as it can be.

    (Max-min fairness: Bertsekas and Gallager, "Data Networks", section 6.5.2.)
    """
    parts = {}
    order = sorted(counts, key=lambda name: (counts[name], hashlib.sha256(name.encode()).digest()))
    for position, name in enumerate(order):
        parts[name] = min(counts[name], room // (len(order) - position))
        room -= parts[name]
    return parts


def _ranked(counts: Mapping[str, int], room: int) -> dict[str, int]:
    first = min(counts.get("demonstrated", 0), room)
    return {"demonstrated": first, "accepted": min(counts.get("accepted", 0), room - first)}


def weighted(lines: Sequence[Line], balance: Balance) -> list[Line]:
    """The lines with their weights: what the source weighs (`base`), times the balance, 1 on average.

    The factor of an example is n^(power - 1) for each of caller, tool and session, which have n examples. A
    caller who spoke in few of the dataset's nights has said in these what counts: its n is what all nights
    would have of it. So who comes for a night or two is taken for as loud as it was then, and not for a quiet
    caller whose few examples weigh much.
    """
    if not lines:
        return []
    said: dict[str, Mapping[str, float]] = {
        "caller": _if_all_nights(lines),
        "tool": Counter(str(line.get("tool", "")) for line in lines),
        "session": Counter(_line_session(line) for line in lines),
    }
    factors = [
        said["caller"][str(line.get("caller", ""))] ** (balance.caller - 1)
        * said["tool"][str(line.get("tool", ""))] ** (balance.tool - 1)
        * said["session"][_line_session(line)] ** (balance.session - 1)
        for line in lines
    ]
    mean, (low, high) = sum(factors) / len(factors), balance.bounds
    return [
        {**line, "weight": round(_base(line) * min(high, max(low, factor / mean)), 4)}
        for line, factor in zip(lines, factors, strict=True)
    ]


def _if_all_nights(lines: Sequence[Line]) -> dict[str, float]:
    """By caller, how many examples it would have, had it said in every night what it said in its own."""
    nights = {str(line.get("cycle", "")) for line in lines}
    by_caller = _grouped(lines, _key("caller"))
    return {
        caller: len(own) * len(nights) / len({str(line.get("cycle", "")) for line in own})
        for caller, own in by_caller.items()
    }


def shares(lines: Sequence[Line]) -> dict[str, Any]:
    """Who and what the training set is of: examples and share of the weight, by source, caller, tool, night.

    Of tools the TOOLS_SHOWN most frequent are told, and how many there are; of sessions only how many there
    are, and the most that one has.
    """
    sessions = Counter(_line_session(line) for line in lines)
    tools = _told(lines, lambda line: str(line.get("tool") or "(text)"))
    weights = [float(line["weight"]) for line in lines]
    return {
        "source": _told(lines, _line_source),
        "caller": _told(lines, lambda line: str(line.get("caller") or "(unknown)")),
        "cycle": _told(lines, lambda line: str(line.get("cycle") or "(unknown)")),
        "tool": dict(list(tools.items())[:TOOLS_SHOWN]),
        "tools": len(tools),
        "sessions": len(sessions),
        "largest_session": max(sessions.values(), default=0),
        "weight": {
            "least": min(weights, default=0.0),
            "mean": round(sum(weights) / max(1, len(weights)), 4),
            "greatest": max(weights, default=0.0),
        },
    }


def _told(lines: Sequence[Line], key: Callable[[Line], str]) -> dict[str, dict[str, float]]:
    total = sum(float(line["weight"]) for line in lines)
    groups = sorted(_grouped(lines, key).items(), key=lambda each: (-len(each[1]), each[0]))
    return {
        name: {
            "examples": len(group),
            "weight_share": round(sum(float(line["weight"]) for line in group) / total, 4),
        }
        for name, group in groups
    }


def _base(line: Line) -> float:
    return float(line.get("base", line.get("weight", 1.0)))


def _grouped(items: Sequence[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    groups: defaultdict[str, list[T]] = defaultdict(list)
    for one in items:
        groups[key(one)].append(one)
    return dict(groups)


def _without(all_: Sequence[Lesson], taken: Sequence[Lesson]) -> list[Lesson]:
    gone = {one.inference_id for one in taken}
    return [one for one in all_ if one.inference_id not in gone]


def _id(one: Lesson) -> str:
    return one.inference_id


def _source(one: Lesson) -> str:
    return one.source


def _tool(one: Lesson) -> str:
    return one.tool


def _session(one: Lesson) -> str:
    return one.session_id


def _key(name: str) -> Callable[[Line], str]:
    return lambda line: str(line.get(name, ""))


def _line_source(line: Line) -> str:
    return "accepted" if line.get("source") == "accepted" else "demonstrated"


def _line_session(line: Line) -> str:
    return str(line.get("session_id") or line["inference_id"])
