"""What of an example decides whether it is learned: small, as a night may bring 100,000 of them."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from grpc_server.domain.chat_format import END_OF_TURN, parse_tool_call
from grpc_server.domain.types import Role, Tool
from training.examples import Example, Source
from training.neighbours import normalised, question

Line = Mapping[str, Any]
"""A line of train.jsonl or gate.jsonl."""

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Lesson:
    """An example without its texts; `prompt` and `voices` (who gives this answer) are fingerprints.

    `answer` is the same for answers that mean the same: without the order of a call's arguments, without a
    text's case and punctuation. `tool` is the one that it calls, empty for text; `tools` were offered.
    `earlier`: an earlier night learned it.
    """

    inference_id: str
    caller: str
    session_id: str
    source: Source
    prompt: str
    question: str
    instructions: str
    tools: frozenset[str]
    tool: str
    answer: str
    voices: frozenset[str]
    earlier: bool = False

    @property
    def asked_words(self) -> frozenset[str]:
        """The words of the request, instructions included."""
        return words(f"{self.instructions} {self.question}")


@lru_cache(maxsize=16_384)
def words(text: str) -> frozenset[str]:
    """The words and numbers of a text that is without case."""
    return frozenset(_WORD.findall(text))


def fingerprint(text: str) -> str:
    """16 hex digits by which a text is known again, and from which it is not read."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def lesson(one: Example) -> Lesson:
    """The lesson of an example of this night."""
    call = one.answer.tool_calls[0] if one.answer.tool_calls else None
    system = (each.content for each in one.request.messages if each.role is Role.SYSTEM)
    return Lesson(
        inference_id=one.inference_id,
        caller=sys.intern(one.caller),
        session_id=one.session_id,
        source=one.source,
        prompt=fingerprint(one.prompt),
        question=question(one.request),
        instructions=sys.intern(normalised(system)),
        tools=_offered(one.request.tools),
        tool=sys.intern(call.name) if call else "",
        answer=answer_key(one.completion, one.request.tools),
        voices=frozenset([fingerprint(one.caller)]),
    )


def lesson_of_line(line: Line) -> Lesson:
    """The lesson that a line of train.jsonl is; an imported one has no caller, and no voices."""
    tools = [Tool(name, "", {}) for name in line.get("tools", ())]
    call = parse_tool_call(line["completion"], tools)
    caller = str(line.get("caller", ""))
    return Lesson(
        inference_id=str(line["inference_id"]),
        caller=caller,
        session_id=str(line.get("session_id", "")),
        source="accepted" if line.get("source") == "accepted" else "demonstrated",
        prompt=fingerprint(line["prompt"]),
        question=str(line["question"]),
        instructions="",
        tools=_offered(tools),
        tool=call.name if call else "",
        answer=answer_key(line["completion"], tools),
        voices=frozenset(line.get("voices", [fingerprint(caller)] if caller else ())),
        earlier=True,
    )


def answer_key(completion: str, tools: Iterable[Tool]) -> str:
    """What is the same for answers that mean the same."""
    call = parse_tool_call(completion, list(tools))
    if call is not None:
        return json.dumps([call.name, call.arguments], sort_keys=True, ensure_ascii=False)
    said = completion.removesuffix(END_OF_TURN)
    return normalised([said]) or said


_sets: dict[frozenset[str], frozenset[str]] = {}


def _offered(tools: Iterable[Tool]) -> frozenset[str]:
    """The names of tools; services offer the same ones again and again."""
    names = frozenset(sys.intern(tool.name) for tool in tools)
    return _sets.setdefault(names, names)
