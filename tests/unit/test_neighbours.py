"""Questions that are nearly others, found by MinHash and told exactly."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from training import bfcl
from training.neighbours import CROWD, NEAR, Neighbours, near_pairs, normalised, similarity


def test_the_index_finds_what_comparing_all_with_all_finds() -> None:
    questions = sorted({normalised(each.content for each in item.messages) for item in bfcl.traffic(250)})
    found = {(one, other): alike for one, other, alike in near_pairs(questions)}
    every = {
        (one, other): alike
        for other in range(len(questions))
        for one in range(other)
        if (alike := similarity(questions[one], questions[other])) >= NEAR
    }
    assert every and found == every
    index = Neighbours(questions[::2])
    for number in range(1, len(questions), 2):
        near = any(similarity(questions[number], each) >= NEAR for each in questions[::2])
        assert index.near(questions[number]) is near


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=8))
def test_a_question_is_near_itself_whatever_it_is_made_of(texts: list[str]) -> None:
    questions = [normalised([text]) for text in texts]
    index = Neighbours(questions)
    assert all(index.near(text) for text in questions)
    assert not Neighbours([]).near("weather in oslo")


def test_the_same_words_are_the_same_question() -> None:
    assert normalised(["Weather,  in \uff2fSLO_now?!"]) == "weather in oslo now"
    assert normalised(["", " "]) == ""


def test_a_flood_from_one_template_is_compared_with_a_few_of_its_like() -> None:
    drawn = random.Random(7)
    flood = [
        f"what will the weather be like tomorrow morning in the city number {drawn.randrange(10**6)}"
        for _ in range(400)
    ]
    pairs = list(near_pairs(flood))
    assert len(pairs) <= CROWD * len(flood)
    assert {later for _, later, _ in pairs} == set(range(1, len(flood)))
    assert all(first < later for first, later, _ in pairs)
