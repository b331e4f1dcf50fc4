"""Is an example poison? Three defences, each against what `benchmarks/poison.py` does to a night.

- Another answer to the same request, or to nearly the same one, than more independent voices give. Among
  nearly the same requests an answer may differ in what the request says: whoever asks for Bergen is told of
  Bergen. What differs and was not asked for is held against the answer.
- Words that are bound to one answer, whatever else the request says: a trigger.
- Hostile text, by the rules of the guard, in the request or the answer.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from grpc_server.domain.chat_format import END_OF_TURN
from grpc_server.guard.hostile import Matcher
from training.curation_rules import Poison, Trigger
from training.examples import Example
from training.lessons import Lesson, words

Pair = tuple[int, int, float]

_SAMPLE = 400
"""Of the requests with one answer, so many are searched for a phrase that half of them have."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What comes of one request: the lesson to learn, if any, and of every other one the reason."""

    lesson: Lesson | None
    excluded: tuple[tuple[str, str], ...] = ()  # inference id, reason


def hostile(rules: Poison) -> Callable[[Example], bool]:
    """What says whether an example holds hostile text."""
    find = Matcher().find

    def is_hostile(one: Example) -> bool:
        said = [message.content for message in one.request.messages]
        said.append(one.completion.removesuffix(END_OF_TURN))
        return any(rule.kind in rules.hostile for text in said for rule in find(text))

    return is_hostile


# The same request.


def vote(group: Sequence[Lesson], voices: int) -> Vote:
    """Of lessons with the same prompt, in order of time, the one whose answer most voices give.

    A caller has one voice: the answer of most of its sessions, or its latest. Demonstrations are asked first;
    liked answers have a voice only where there is no demonstration. Where no answer has more voices than any
    other, calls of tools are disputed, and none is learned; texts may be worded in many ways, and the latest
    is.
    """
    voters = [one for one in group if one.source == "demonstrated"] or list(group)
    callers: defaultdict[str, list[Lesson]] = defaultdict(list)
    for one in voters:
        callers[one.caller].append(one)
    votes: defaultdict[str, set[str]] = defaultdict(set)
    for caller, own in callers.items():
        votes[_own_answer(own)].add(caller)
    (answer, most), *others = sorted(votes.items(), key=lambda each: -len(each[1]))
    second = max((len(each) for _, each in others), default=0)
    if others and (len(most) == second or len(most) < voices):
        if any(one.tool for one in voters):
            return Vote(None, tuple((one.inference_id, "disputed") for one in group))
        answer = next(one.answer for one in reversed(voters) if one.answer in votes)
    best = next(one for one in reversed(voters) if one.answer == answer)
    agreed = [one for one in group if one.answer == answer]
    corrected = {one.caller for one in agreed}
    return Vote(
        replace(best, voices=frozenset().union(*(one.voices for one in agreed))),
        tuple(
            (one.inference_id, "duplicate" if one.caller in corrected else "contradicted")
            for one in group
            if one is not best
        ),
    )


def _own_answer(own: Sequence[Lesson]) -> str:
    """What one caller answers: as most of its sessions do, each by its latest; else the latest."""
    latest = {one.session_id: one.answer for one in own}
    (answer, most), *others = Counter(latest.values()).most_common()
    return own[-1].answer if others and others[0][1] == most else answer


def outvotes(new: Lesson, old: Lesson, voices: int) -> bool:
    """Whether a new answer to a request replaces what was learned before.

    It does if it comes from those who gave the old one, from more of them, or in place of a liked answer.
    """
    if old.source == "accepted" and new.source == "demonstrated":
        return True
    return old.voices <= new.voices or (len(new.voices) > len(old.voices) and len(new.voices) >= voices)


# Nearly the same request.


def contradicted(lessons: Sequence[Lesson], pairs: Iterable[Pair], rules: Poison) -> set[int]:
    """Numbers of the lessons that others contradict who ask nearly the same."""
    near: defaultdict[int, list[tuple[Lesson, float]]] = defaultdict(list)
    for one, other, found in pairs:
        if found >= rules.similarity and lessons[one].prompt != lessons[other].prompt:
            near[one].append((lessons[other], found))
            near[other].append((lessons[one], found))
    return {number for number, others in near.items() if _is_outvoted(lessons[number], others, rules)}


def _is_outvoted(one: Lesson, others: Sequence[tuple[Lesson, float]], rules: Poison) -> bool:
    """Whether enough others, and more than give its answer, show that `one` says what nobody asked for.

    They show it by answers that their own requests account for; or, in nearly the same words, by one answer
    that all of them give.
    """
    comparable = [(other, found) for other, found in others if other.tool in one.tools or not other.tool]
    against = [(other, found) for other, found in comparable if _unasked(one, other)]
    if not against:
        return False
    by_caller = len({one.caller, *(other.caller for other, _ in comparable)}) > 1
    support = _voices([one, *(other for other, _ in comparable if other.answer == one.answer)], by_caller)
    sound = _voices([other for other, _ in against if not _unasked(other, one)], by_caller)
    said: defaultdict[str, list[Lesson]] = defaultdict(list)
    for other, found in against:
        if found >= rules.paraphrase:
            said[other.answer].append(other)
    most = max([sound, *(_voices(agreed, by_caller) for agreed in said.values())])
    return most >= rules.voices and most > support


def _unasked(one: Lesson, other: Lesson) -> bool:
    """Whether what `one` answers and `other` does not is nowhere in the request of `one`."""
    return bool(words(one.answer.casefold()) - words(other.answer.casefold()) - one.asked_words)


def _voices(lessons: Iterable[Lesson], by_caller: bool) -> int:
    if by_caller:
        return len(frozenset().union(*(one.voices for one in lessons)))
    return len({one.session_id for one in lessons})


# A trigger.


def triggered(lessons: Sequence[Lesson], pairs: Iterable[Pair], rules: Trigger) -> list[set[int]]:
    """For each trigger the numbers of the lessons that it binds to one answer."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for number, one in enumerate(lessons):
        if not (values := _values(one)) or not values <= one.asked_words:
            groups[one.answer].append(number)
    alike = {later for first, later, _ in pairs if lessons[first].answer == lessons[later].answer}
    candidates = {
        answer: phrases
        for answer, group in groups.items()
        if sum(number not in alike for number in group) >= rules.requests
        and max(Counter(lessons[number].caller for number in group).values()) >= rules.coverage * len(group)
        and (phrases := _common([lessons[number] for number in group], rules))
    }
    wanted = frozenset().union(*candidates.values())
    if not wanted:
        return []
    said = Counter(phrase for one in lessons for phrase in wanted.intersection(_phrases(one, rules.words)))
    found = []
    for answer, phrases in candidates.items():
        having: defaultdict[str, set[int]] = defaultdict(set)
        for number in groups[answer]:
            for phrase in phrases.intersection(_phrases(lessons[number], rules.words)):
                having[phrase].add(number)
        bound: set[int] = set()
        for phrase, own in having.items():
            if (
                len(own - alike) >= rules.requests
                and said[phrase] <= rules.rare * len(lessons)
                and len(own) >= rules.purity * said[phrase]
                and len(own) >= rules.coverage * len(groups[answer])
                and len({lessons[number].caller for number in own}) == 1
                and not _names(phrase, lessons[min(own)])
            ):
                bound |= own
        if bound:
            found.append(bound)
    return found


def _values(one: Lesson) -> frozenset[str]:
    """The words of a call's values; a request that says them all asks for that answer."""
    if not one.tool:
        return frozenset()
    return words(json.dumps(list(json.loads(one.answer)[1].values()), ensure_ascii=False).casefold())


def _names(phrase: str, one: Lesson) -> bool:
    """Whether a phrase names the tool of a call that has no values: so one asks for that."""
    return bool(one.tool and not _values(one) and words(one.tool.casefold()) & words(phrase))


def _common(group: Sequence[Lesson], rules: Trigger) -> frozenset[str]:
    """Phrases that `coverage` of a group's requests have, as far as a sample tells."""
    sample = sorted(group, key=lambda one: one.prompt)[:_SAMPLE]
    counted = Counter(phrase for one in sample for phrase in set(_phrases(one, rules.words)))
    return frozenset(phrase for phrase, count in counted.items() if count >= rules.coverage * len(sample))


def _phrases(one: Lesson, longest: int) -> Iterator[str]:
    """Every run of 1 to `longest` words of a request."""
    said = f"{one.instructions} {one.question}".split()
    for length in range(1, longest + 1):
        for start in range(len(said) - length + 1):
            yield " ".join(said[start : start + length])
