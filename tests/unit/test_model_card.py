"""A cycle's model card: what the records say, in the form that the Hub reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from agentloop.night import Night
from tests.integration import night_by_hand
from tests.integration.night_by_hand import CANDIDATE
from training import cycle, model_card


def test_the_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    directory = night_by_hand.make(tmp_path)
    tuned = cycle.read_json(directory / "adapter" / "finetune.json")
    tuned |= {"seed": 7, "tokens_per_s": 231.25, "inputs": {"files": {"base": "b" * 64}}}
    cycle.write_json(directory / "adapter" / "finetune.json", tuned)
    note = cycle.read_json(directory / "steps" / "finetune.json")
    cycle.write_json(directory / "steps" / "finetune.json", note | {"gpu_energy_joules": 1234.5})
    text = model_card.write(directory).read_text(encoding="utf-8")
    told = ModelCard(text).data
    assert isinstance(told, ModelCardData)
    assert told.license == "gemma" and told.model_name == CANDIDATE["model_version"]
    results = {one.dataset_name: one.metric_value for one in told.eval_results or ()}
    assert results == {"simple_python": pytest.approx(0.37), "gate": pytest.approx(16 / 38)}
    for said in (
        "**Verdict: pass.**",
        "| seed | 7 |",
        "| learning_rate | 0.0002 |",
        "| tokens, tokens a second | \N{EN DASH}, 231.2 |",
        "| energy of the GPUs | 1,234 J |",
        f"`{'b' * 64}`",
        "192 examples (192 new this night)",
        "- better than the champion: holds.",
        "Gemma Terms of Use",
    ):
        assert said in text, said


def test_what_the_records_do_not_say_is_not_made_up(tmp_path: Path) -> None:
    directory = tmp_path / "20260131T020000Z"
    cycle.write_json(directory / "gate.json", {"verdict": "fail", "candidate": {"model_version": "m:1"}})
    cycle.write_json(directory / "manifest.json", {"erasures": [{"at": "then", "counts": {"train": 2}}]})
    cycle.write_json(directory / "evaluation" / "summary.json", {"suite": 7})
    text = model_card.render(Night(directory))
    assert "type, size | unknown, \N{EN DASH}" in text and "not measured" in text
    assert "This version learned from what is gone" in text
    cycle.write_json(directory / "gate.json", {"verdict": "fail"})
    with pytest.raises(ValueError, match="does not name its candidate"):
        model_card.render(Night(directory))
