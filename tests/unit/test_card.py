"""The dataset's card: every number, in a form that others read, and no text of a prompt."""

from pathlib import Path

import yaml

from tests.integration.night_by_hand import make
from tests.unit.test_curate import call, feedback, frozen, row, traffic
from training import card, curate, cycle, report


def test_the_card_has_every_number_and_no_word_of_a_prompt(tmp_path: Path) -> None:
    rows = [
        *traffic(0, 40),
        row(99, "Tell me about Zanzibar", feedback(call("Zanzibar"), caller="a|b\n# <c>")),
    ]
    directory = frozen(tmp_path / "20260101T000000Z", rows)
    record = curate.run(directory)
    text = (directory / "dataset" / card.CARD).read_text()
    assert text == card.text(record)
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == "other" and about["size_categories"] == ["n<1K"]
    assert {each["split"]: each["path"] for each in about["configs"][0]["data_files"]} == {
        "train": "train.jsonl",
        "gate": "gate.jsonl",
    }
    for reason, count in record["excluded"].items():
        assert f"| not used: {reason.replace('_', ' ')} | {count} |" in body
    assert f"| `support` | {record['shares']['caller']['support']['examples']} |" in body
    assert "| simple_python | 100 | 0 |" in body
    assert "Zanzibar" not in text and "a?b?? ?c?" in text, "a caller's name cannot break the table"


def test_a_dataset_without_any_example_has_a_card_too(tmp_path: Path) -> None:
    directory = frozen(tmp_path / "20260101T000000Z", [row(1, "Weather?")])
    record = curate.run(directory)
    assert "Not enough to learn from: 0 new training examples, 32 needed." in card.text(record)
    assert cycle.read_json(directory / "dataset" / "dataset.json")["licences"]


def test_the_report_links_the_card(tmp_path: Path) -> None:
    directory = make(tmp_path, until="curate")
    record = cycle.read_json(directory / "dataset" / "dataset.json")
    cycle.write_json(directory / "dataset" / "dataset.json", record | {"shares": {"caller": {}}})
    assert 'href="dataset/card.md"' in report.run(directory).read_text(encoding="utf-8")
