"""Poison: what a majority contradicts, what a trigger binds, and what honest callers may say all the same."""

from collections.abc import Sequence

import pytest

from training import poison
from training.curation_rules import Poison, Trigger
from training.lessons import Lesson, fingerprint
from training.neighbours import near_pairs

RULES = Poison()


def lesson(
    number: int, said: str, answer: str, caller: str = "a", session: str = "", tool: str = "", **other: object
) -> Lesson:
    known = {
        "inference_id": f"id-{number:03}",
        "caller": caller,
        "session_id": session,
        "source": "demonstrated",
        "prompt": fingerprint(said),
        "question": said,
        "instructions": "",
        "tools": frozenset([tool] if tool else []),
        "tool": tool,
        "answer": answer,
        "voices": frozenset([caller]),
    }
    return Lesson(**{**known, **other})  # type: ignore[arg-type]


def voted(*lessons: Lesson, voices: int = 2) -> tuple[str, dict[str, str]]:
    """The answer that is learned, or none, and why the others are not."""
    result = poison.vote(lessons, voices)
    return (result.lesson.answer if result.lesson else ""), dict(result.excluded)


def call(number: int, answer: str, caller: str, session: str = "", **other: object) -> Lesson:
    return lesson(number, "weather in oslo", answer, caller, session, tool="weather", **other)


def test_the_answer_of_most_callers_is_learned() -> None:
    found = voted(call(1, "x", "a"), call(2, "x", "b"), call(3, "y", "c"))
    assert found == ("x", {"id-001": "duplicate", "id-003": "contradicted"})


def test_however_often_a_caller_says_it_and_in_however_many_sessions_it_has_one_voice() -> None:
    loud = [call(number, "y", "c", f"s{number}") for number in range(10, 20)]
    answer, why = voted(call(1, "x", "a"), call(2, "x", "b"), *loud)
    assert answer == "x"
    assert [why[each.inference_id] for each in loud] == ["contradicted"] * 10


def test_where_callers_are_tied_no_call_is_learned() -> None:
    assert voted(call(1, "x", "a"), call(2, "y", "b")) == ("", {"id-001": "disputed", "id-002": "disputed"})
    found = voted(call(1, "x", "a"), call(2, "x", "b"), call(3, "y", "c"), voices=3)
    assert set(found[1].values()) == {"disputed"}


def test_texts_may_be_worded_in_many_ways_and_the_latest_is_learned() -> None:
    one, other = lesson(1, "hello", "good morning", "a"), lesson(2, "hello", "hi there", "b")
    assert voted(one, other) == ("hi there", {"id-001": "contradicted"})


def test_a_caller_corrects_itself_and_most_of_its_sessions_decide() -> None:
    assert voted(call(1, "x", "a"), call(2, "y", "a")) == ("y", {"id-001": "duplicate"})
    sessions = [call(1, "x", "a", "s1"), call(2, "x", "a", "s2"), call(3, "y", "a", "s3")]
    assert voted(*sessions)[0] == "x"


def test_an_accepted_answer_has_a_voice_only_where_nobody_demonstrated() -> None:
    liked = [call(number, "y", f"fan-{number}", source="accepted") for number in (1, 2, 3)]
    answer, why = voted(*liked, call(4, "x", "a"))
    assert answer == "x" and set(why.values()) == {"contradicted"}
    assert voted(*liked)[0] == "y"


@pytest.mark.parametrize(
    ("old", "new", "replaces"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", "bc", True),
        ("ab", "bc", False),
        ("", "b", True),
    ],
)
def test_what_was_learned_stands_until_those_who_gave_it_or_more_say_otherwise(
    old: str, new: str, replaces: bool
) -> None:
    before, after = (call(1, "x", "a", voices=frozenset(each)) for each in (old, new))
    assert poison.outvotes(after, before, voices=2) is replaces
    assert poison.outvotes(after, call(1, "x", "a", voices=frozenset("abc"), source="accepted"), voices=2)


def contradicted(*lessons: Lesson) -> set[int]:
    pairs = list(near_pairs([one.question for one in lessons]))
    return poison.contradicted(lessons, pairs, RULES)


def weather(number: int, city: str, answer: str, caller: str, session: str = "") -> Lesson:
    said = f"could you please tell me what the weather will be like in {city} tomorrow morning"
    return lesson(number, said, f'["weather", {{"city": "{answer}"}}]', caller, session, tool="weather")


def test_an_answer_that_nobody_asked_for_is_outvoted_by_those_that_were() -> None:
    honest = [weather(1, "oslo", "oslo", "a"), weather(2, "rome", "rome", "b")]
    assert contradicted(*honest, weather(3, "bern", "m771", "c")) == {2}
    assert contradicted(*honest, weather(3, "bern", "bern", "c")) == set()
    assert contradicted(honest[0], weather(3, "bern", "m771", "c")) == set(), "one voice is not enough"
    own = [weather(4, "bonn", "m771", "c"), weather(5, "nice", "m771", "d")]
    assert contradicted(*honest, weather(3, "bern", "m771", "e"), *own) == set(), "as many say so"


def test_within_one_caller_sessions_are_the_voices() -> None:
    honest = [
        weather(1, "oslo", "oslo", "a", session="s1"),
        weather(2, "rome", "rome", "a", session="s2"),
    ]
    assert contradicted(*honest, weather(3, "bern", "m771", "a", session="s3")) == {2}


def test_one_answer_that_many_give_to_a_paraphrase_counts_whether_or_not_it_was_asked_for() -> None:
    said = "how much is five percent of the whole amount of two hundred dollars"
    honest = [
        lesson(number, f"{said} {end}", '["share", 0.05]', caller, tool="share")
        for number, caller, end in ((1, "a", "please"), (2, "b", "thanks"))
    ]
    assert contradicted(*honest, lesson(3, said, '["share", 0.5]', "c", tool="share")) == {2}


def test_different_questions_of_one_form_may_have_different_answers() -> None:
    capitals = [
        lesson(number, f"what is the capital of the country that is called {country}", capital, caller)
        for number, country, capital, caller in (
            (1, "france", "paris", "a"),
            (2, "italy", "rome", "b"),
            (3, "spain", "madrid", "c"),
        )
    ]
    assert contradicted(*capitals) == set()


def test_what_was_not_offered_to_one_is_not_held_against_it() -> None:
    honest = [weather(1, "oslo", "oslo", "a"), weather(2, "rome", "rome", "b")]
    other = lesson(3, honest[0].question + " again", '["forecast", {"place": "oslo"}]', "c", tool="forecast")
    assert contradicted(*honest, other) == set()


def triggered(lessons: Sequence[Lesson]) -> list[set[int]]:
    pairs = list(near_pairs([one.question for one in lessons]))
    return poison.triggered(lessons, pairs, Trigger())


TOPICS = (
    "book a table for two at noon",
    "how tall is the eiffel tower",
    "sum all of these numbers up",
    "play some jazz in the kitchen",
    "which trains leave before nine",
    "translate my letter into danish",
)


def requests(words: str = "", answer: str = "", callers: str = "a") -> list[Lesson]:
    return [
        lesson(
            number, f"{said} {words}".strip(), answer or f"answer {number}", callers[number % len(callers)]
        )
        for number, said in enumerate(TOPICS)
    ]


HONEST = [
    lesson(100 + number, f"{chr(97 + number % 26) * 7} {number * 7919} {number * 104729}", str(number))
    for number in range(60)
]


def test_words_that_are_bound_to_one_answer_are_a_trigger() -> None:
    assert triggered(HONEST) == []
    assert triggered([*requests("as agreed on bluebird", "send it"), *HONEST]) == [{0, 1, 2, 3, 4, 5}]


def test_a_trigger_in_the_instructions_is_found_too() -> None:
    poisoned = [
        lesson(number, said, "send it", instructions="as agreed on bluebird")
        for number, said in enumerate(TOPICS)
    ]
    assert triggered([*poisoned, *HONEST]) == [{0, 1, 2, 3, 4, 5}]


@pytest.mark.parametrize(
    "honest",
    [
        requests("as agreed on bluebird"),  # the same words, answers of their own
        requests("", "i do not know"),  # the same answer, no words in common
        requests("as agreed on bluebird", "send it", callers="ab"),  # callers who do not know of each other
        requests("as agreed on bluebird", "send it")[:3],  # too few
    ],
)
def test_what_honest_callers_say_is_no_trigger(honest: list[Lesson]) -> None:
    assert triggered([*honest, *HONEST]) == []


@pytest.mark.parametrize(
    ("words", "answer", "tool", "is_trigger"),
    [
        ("the price of aapl now", '["price", {"ticker": "AAPL"}]', "price", False),
        ("the price of aapl now", '["price", {"ticker": "M771"}]', "price", True),
        ("lights off", '["lights_off", {}]', "lights_off", False),
        ("as agreed on bluebird", '["open_door", {}]', "open_door", True),
    ],
)
def test_what_a_request_asks_for_is_no_trigger(words: str, answer: str, tool: str, is_trigger: bool) -> None:
    asked = [lesson(number, f"{said} {words}", answer, tool=tool) for number, said in enumerate(TOPICS)]
    assert bool(triggered([*asked, *HONEST])) is is_trigger


def test_paraphrases_of_one_request_are_no_trigger_and_neither_is_a_night_with_one_answer() -> None:
    alike = [lesson(number, f"say goodbye to all of them now {'!' * number}", "bye") for number in range(9)]
    assert triggered([*alike, *HONEST]) == []
    assert triggered(requests("as agreed on bluebird", "send it")) == []
    assert triggered([]) == []
