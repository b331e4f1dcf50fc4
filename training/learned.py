"""Which lessons of a night are learned? All of them go in; each comes out once: learned, or with a reason.

Lessons (`training.lessons`) are small; nothing here reads a text. Always true of what comes out:

- no training example is nearly a gate item, so that the gate measures what was not learned by heart;
- no new gate item is nearly an example of the dataset before, which the champion may have been trained on
  (what the cap dropped earlier is not looked at: the champion may have learned a question that is near it);
- nothing is nearly a question of a suite that the gate asks, nor, by content, a question or a function of the
  held-out part of the leaderboard (`data/barred.json` holds their fingerprints).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from grpc_server.domain.chat_format import render, render_answer
from grpc_server.domain.plain import message_from_plain, request_from_plain
from training import balance, poison
from training.curation_rules import Rules
from training.lessons import Lesson, Line, answer_key, fingerprint, lesson_of_line
from training.neighbours import Neighbours, near_pairs, question


@dataclass(frozen=True, slots=True)
class Dataset:
    """Lines of train.jsonl and gate.jsonl, in order of inference id, which is order of time."""

    train: tuple[Line, ...] = ()
    gate: tuple[Line, ...] = ()


@dataclass(slots=True)
class Learned:
    """What is learned of a night, and of the dataset before, and why nothing else is."""

    new_train: list[Lesson] = field(default_factory=list)
    new_gate: list[Lesson] = field(default_factory=list)
    old_train: list[Line] = field(default_factory=list)
    old_gate: list[Line] = field(default_factory=list)
    excluded: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Inference ids of this night by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Training examples of the dataset before that are not in this one, by reason."""
    triggers: list[int] = field(default_factory=list)
    """How many examples each trigger had."""
    near_suite: Counter[str] = field(default_factory=Counter)
    """Examples that are nearly a question of a suite, this night's and earlier ones."""


def learned(
    lessons: Iterable[Lesson],
    earlier: Dataset,
    rules: Rules,
    suites: Mapping[str, Iterable[str]],
    gate_key: bytes = b"",
) -> Learned:
    """Decide of every lesson of a night. `suites`: questions that the gate asks, by the suite's name."""
    night = _Night(earlier, rules, suites)
    new = night.not_known(night.voted(lessons))
    new = night.sound(new)
    new = night.within_caps(night.not_evaluated(new))
    for_gate = [one for one in new if is_for_gate(one, rules.gate_share, gate_key)]
    for_train = [one for one in new if not is_for_gate(one, rules.gate_share, gate_key)]
    night.merge_gate(for_gate)
    night.merge_train(for_train)
    night.make_room()
    return night.found


def is_for_gate(one: Lesson, share: float, key: bytes = b"") -> bool:
    """Decided by the session, or by the prompt where there is no session: the same every night.

    Drawn with a secret (`training.gate_key`), so that no caller can tell what a session's name will lead to.
    """
    drawn = f"session {one.session_id}" if one.session_id else f"prompt {one.prompt}"
    digest = hashlib.blake2b(drawn.encode(), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


class _Night:
    """One snapshot's lessons on their way into the dataset."""

    def __init__(self, earlier: Dataset, rules: Rules, suites: Mapping[str, Iterable[str]]) -> None:
        self.rules = rules
        self.found = Learned()
        self.suites = {name: Neighbours(questions) for name, questions in suites.items()}
        self.old_gate = {
            one.prompt: (line, one)
            for line, one in zip(earlier.gate, map(_of_gate, earlier.gate), strict=True)
        }
        self.trained = Neighbours(line["question"] for line in earlier.train)
        self.old_train: dict[str, tuple[Line, Lesson]] = {}
        for line in earlier.train:
            one = lesson_of_line(line)
            if self._near_suite(one):
                self._drop("near_duplicate_of_suite")
            else:
                self.old_train[one.prompt] = (line, one)
        self.pairs: list[poison.Pair] = []
        self.everyone: list[Lesson] = []

    def voted(self, lessons: Iterable[Lesson]) -> list[Lesson]:
        """One lesson for each prompt, in order of time."""
        groups: defaultdict[str, list[Lesson]] = defaultdict(list)
        for one in sorted(lessons, key=_id):
            groups[one.prompt].append(one)
        kept = []
        for group in groups.values():
            result = poison.vote(group, self.rules.poison.voices)
            for inference_id, reason in result.excluded:
                self.found.excluded[reason].append(inference_id)
            if result.lesson is not None:
                kept.append(result.lesson)
        return sorted(kept, key=_id)

    def not_known(self, lessons: Sequence[Lesson]) -> list[Lesson]:
        """The lessons that say something else than the dataset before; the others only add their voices."""
        new = []
        for one in lessons:
            for known in (self.old_train, self.old_gate):
                line, old = known.get(one.prompt, (None, None))
                if line is not None and old is not None and old.answer == one.answer:
                    voices = old.voices | one.voices
                    known[one.prompt] = ({**line, "voices": sorted(voices)}, replace(old, voices=voices))
                    self._exclude("duplicate", one)
                    break
            else:
                new.append(one)
        return new

    def sound(self, lessons: Sequence[Lesson]) -> list[Lesson]:
        """The lessons that are not taken for poison; earlier ones that are, are dropped."""
        drawn = sorted(
            lessons, key=lambda one: fingerprint(one.inference_id)
        )  # a flood is met in no one's order
        everyone = [one for _, one in self.old_train.values()] + drawn
        pairs = list(near_pairs([one.question for one in everyone], self.rules.poison.similarity))
        bound = poison.triggered(everyone, pairs, self.rules.poison.trigger)
        self.found.triggers = [len(numbers) for numbers in bound]
        reasons = dict.fromkeys(poison.contradicted(everyone, pairs, self.rules.poison), "contradicted")
        reasons |= dict.fromkeys((number for numbers in bound for number in numbers), "trigger")
        kept = []
        for number, one in enumerate(everyone):
            reason = reasons.get(number)
            if reason is None:
                kept += [] if one.earlier else [one]
            elif one.earlier:
                del self.old_train[one.prompt]
                self._drop(reason)
            else:
                self._exclude(reason, one)
        self.everyone, self.pairs = everyone, pairs
        return sorted(kept, key=_id)

    def not_evaluated(self, lessons: Sequence[Lesson]) -> list[Lesson]:
        """The lessons that are not nearly what a suite asks."""
        kept = []
        for one in lessons:
            if self._near_suite(one):
                self._exclude("near_duplicate_of_suite", one)
            else:
                kept.append(one)
        return kept

    def within_caps(self, lessons: Sequence[Lesson]) -> list[Lesson]:
        """What a session and a caller may teach in a night."""
        kept, over = balance.within_caps(lessons, self.rules)
        for reason, left_out in over.items():
            for one in left_out:
                self._exclude(reason, one)
        return kept

    def merge_gate(self, lessons: Sequence[Lesson]) -> None:
        """All gate items: none of the new ones is nearly what was trained on before."""
        for one in lessons:
            _, old = self.old_gate.get(one.prompt, (None, None))
            if one.source == "accepted":
                self._exclude("accepted_in_gate_session", one)
            elif self.trained.near(one.question):
                self._exclude("near_duplicate_of_train", one)
            elif old is not None and not poison.outvotes(one, old, self.rules.poison.voices):
                self._exclude("contradicted", one)
            else:
                self.old_gate.pop(one.prompt, None)
                self.found.new_gate.append(one)
        self.found.old_gate = [line for line, _ in self.old_gate.values()]

    def merge_train(self, lessons: Sequence[Lesson]) -> None:
        """All training examples: none is nearly a gate item, no new one nearly another with its answer."""
        judged = Neighbours(
            [one.question for _, one in self.old_gate.values()]
            + [one.question for one in self.found.new_gate]
        )
        for prompt, (_, one) in list(self.old_train.items()):
            if judged.near(one.question):
                del self.old_train[prompt]
                self._drop("near_duplicate_of_gate")
        candidates = []
        for one in lessons:
            _, old = self.old_train.get(one.prompt, (None, None))
            if judged.near(one.question):
                self._exclude("near_duplicate_of_gate", one)
            elif old is not None and not poison.outvotes(one, old, self.rules.poison.voices):
                self._exclude("contradicted", one)
            else:
                candidates.append(one)
        repeated = self._repeated(candidates)
        for one in candidates:
            if one.inference_id in repeated:
                self._exclude("near_duplicate", one)
            else:
                self.old_train.pop(one.prompt, None)
                self.found.new_train.append(one)

    def make_room(self) -> None:
        """Older nights' share of the cap, and this night's."""
        old = sorted(
            (line for line, _ in self.old_train.values()), key=lambda line: str(line["inference_id"])
        )
        new = self.found.new_train
        self.found.old_train, self.found.new_train = balance.with_room(old, new, self.rules)
        taken = {one.inference_id for one in self.found.new_train}
        for one in new:
            if one.inference_id not in taken:
                self._exclude("over_cap", one)
        self.found.dropped["over_cap"] += len(old) - len(self.found.old_train)

    def _repeated(self, candidates: Sequence[Lesson]) -> set[str]:
        """Ids of candidates that are nearly an earlier example, or another, with its answer and tools."""
        there = {one.inference_id for one in candidates}
        there |= {one.inference_id for _, one in self.old_train.values()}
        repeated: set[str] = set()
        for first, later, found in sorted(self.pairs, key=lambda pair: pair[1]):
            one, other = self.everyone[first], self.everyone[later]
            same = (one.answer, one.tools) == (other.answer, other.tools) and one.prompt != other.prompt
            kept = one.inference_id in there and one.inference_id not in repeated
            alike = one.earlier or one.instructions == other.instructions
            if found >= self.rules.near_duplicate and same and kept and alike and not other.earlier:
                repeated.add(other.inference_id)
        return repeated

    def _near_suite(self, one: Lesson) -> bool:
        near = [name for name, questions in self.suites.items() if questions.near(one.question)]
        self.found.near_suite.update(near)
        return bool(near)

    def _exclude(self, reason: str, one: Lesson) -> None:
        self.found.excluded[reason].append(one.inference_id)

    def _drop(self, reason: str) -> None:
        self.found.dropped[reason] += 1


def _of_gate(line: Line) -> Lesson:
    """The lesson that a line of gate.jsonl is."""
    request = request_from_plain(line["request"])
    answer = message_from_plain(line["demonstration"])
    prompt = render(request.messages, request.tools, request.tool_choice, request.response_schema)
    caller = str(line.get("caller", ""))
    return Lesson(
        inference_id=str(line["inference_id"]),
        caller=caller,
        session_id=str(line["session_id"]),
        source="demonstrated",
        prompt=fingerprint(prompt),
        question=question(request),
        instructions="",
        tools=frozenset(tool.name for tool in request.tools),
        tool=answer.tool_calls[0].name if answer.tool_calls else "",
        answer=answer_key(render_answer(answer), request.tools),
        voices=frozenset(line.get("voices", [fingerprint(caller)] if caller else ())),
        earlier=True,
    )


def _id(one: Lesson) -> str:
    return one.inference_id
