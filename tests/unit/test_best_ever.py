"""The best ever: of all that served, who was surest to be right, over all nights' questions."""

import json
from pathlib import Path

from training import best_ever, cycle

BASE = {"model_version": "gemma:base", "sha256": "0" * 64}
FIRST = {"model_version": "gemma:20260101T020000Z", "sha256": "1" * 64}
SECOND = {"model_version": "gemma:20260102T020000Z", "sha256": "2" * 64}
TONIGHT = "20260104T020000Z"


def evaluated(cycles: Path, name: str, suite: str = "gate", **right: tuple[dict[str, str], int]) -> None:
    """A judged night: by subject who it was, and how many of 40 items it had right."""
    directory = cycles / name
    (directory / "evaluation").mkdir(parents=True)
    cycle.write_json(directory / "gate.json", {})
    with (directory / "evaluation" / f"{suite}.jsonl").open("w") as file:
        for subject, (who, correct) in right.items():
            for number in range(40):
                row = {
                    "item_id": f"{name}-{number}",
                    "subject": subject,
                    "model_version": who["model_version"],
                    "model_sha256": who["sha256"],
                    "correct": number < correct,
                }
                file.write(json.dumps(row) + "\n")
            file.write("\n")


def order(cycles: Path, champion: dict[str, str], suite: str = "gate") -> list[str]:
    return [version.sha256[0] for version in best_ever.ranked(cycles / TONIGHT, suite, champion)]


def test_on_the_first_night_the_champion_is_the_best_ever(tmp_path: Path) -> None:
    assert order(tmp_path, BASE) == ["0"]
    (found,) = best_ever.ranked(tmp_path / "by hand", "gate", BASE)
    assert found.model_version == BASE["model_version"] and found.at_least == 0


def test_a_former_champion_that_was_better_is_found_again(tmp_path: Path) -> None:
    evaluated(tmp_path, "20260101T020000Z", champion=(BASE, 0), candidate=(FIRST, 30))
    evaluated(tmp_path, "20260102T020000Z", champion=(FIRST, 30), candidate=(SECOND, 27))
    assert order(tmp_path, SECOND) == ["1", "2", "0"]
    assert order(tmp_path, SECOND, "another suite") == ["2"]


def test_a_candidate_that_never_served_is_not_the_best_however_good(tmp_path: Path) -> None:
    evaluated(tmp_path, "20260101T020000Z", champion=(BASE, 3), candidate=(FIRST, 40))
    assert order(tmp_path, BASE) == ["0"]


def test_of_equals_it_is_the_champion_which_need_not_be_asked_again(tmp_path: Path) -> None:
    evaluated(tmp_path, "20260101T020000Z", champion=(SECOND, 20), candidate=(FIRST, 20))
    evaluated(tmp_path, "20260102T020000Z", champion=(FIRST, 20), candidate=(SECOND, 20))
    assert order(tmp_path, FIRST)[0] == "1" and order(tmp_path, SECOND)[0] == "2"


def test_more_nights_make_surer_and_answers_held_to_a_schema_do_not_count(tmp_path: Path) -> None:
    evaluated(tmp_path, "20260101T020000Z", champion=(FIRST, 20), base_constrained=(FIRST, 40))
    evaluated(tmp_path, "20260102T020000Z", champion=(SECOND, 20))
    evaluated(tmp_path, "20260103T020000Z", champion=(FIRST, 20))
    assert order(tmp_path, SECOND) == ["1", "2"]


def test_a_night_without_a_verdict_says_nothing(tmp_path: Path) -> None:
    evaluated(tmp_path, "20260101T020000Z", champion=(FIRST, 40))
    (tmp_path / "20260101T020000Z" / "gate.json").unlink()
    assert order(tmp_path, BASE) == ["0"]
