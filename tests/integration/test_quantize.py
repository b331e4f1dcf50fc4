"""From base and adapter to one GGUF that engines can serve, with llama.cpp's own programs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny_gguf import described_alike, tiny_gguf
from training import base, cycle, llama, measures, quantize
from training.__main__ import app
from training.subjects import Subject


@pytest.fixture(autouse=True)
def a_third_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the divergence is measured on takes most of the time of these tests."""
    monkeypatch.setattr(llama, "_CHUNKS", 2)


@pytest.fixture
def night(tmp_path: Path) -> Path:
    """A cycle whose training set is some text; nothing else is there yet."""
    directory = tmp_path / "20260101T000000Z"
    (directory / "dataset").mkdir(parents=True)
    question = "add(a: integer, b: integer)\n\nAdd 2 and 3."
    example = {
        "prompt": f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n",
        "completion": '{"name": "add", "arguments": {"a": 2, "b": 3}}<end_of_turn>',
    }
    lines = [json.dumps(example | {"inference_id": str(number)}) for number in range(40)]
    (directory / "dataset" / "train.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def with_importance(tmp_path: Path) -> Path:
    """The options, with an importance matrix."""
    config = tmp_path / "quantize.yaml"
    text = quantize.CONFIG.read_text()
    config.write_text(text.replace("importance_characters: 0", "importance_characters: 24000"))
    return config


def adapter(directory: Path, folder: Path, deviation: float) -> None:
    """An adapter of the real base, of random weights."""
    base.stay_offline()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=deviation)
    adapted.save_pretrained(directory / "adapter")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_base_and_adapter_become_one_gguf_with_the_bases_tokenizer_and_a_small_divergence(
    night: Path, base_gguf: Path, with_importance: Path
) -> None:
    """With an importance matrix; without one the small cycle end to end does the same in `make test`."""
    state = base_gguf.parents[1]
    adapter(night, base.hugging_face_folder(base_gguf, state), 0.002)
    made = quantize.run(night, base_gguf, state, with_importance)

    assert made["type"] == "Q4_K_M"
    assert made["sha256"] == cycle.sha256(night / "model.gguf")
    assert made["size_bytes"] == (night / "model.gguf").stat().st_size
    assert made["importance_matrix"], "40 examples are enough for one"
    assert 0 <= made["kl_divergence"] <= quantize.read_config().most_divergence
    assert made["same_top_share"] > 0.9
    described_alike(night / "model.gguf", base_gguf)
    assert [path.name for path in night.iterdir() if path.name.startswith(".quantize")] == []

    written = (night / "model.gguf").stat().st_mtime_ns
    command: list[str | Path] = [sys.executable, "-m", "training", "quantize", "--cycle", night]
    command += ["--base-gguf", base_gguf, "--state-dir", state, "--config", with_importance]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Q4_K_M" in again.stdout
    assert (night / "model.gguf").stat().st_mtime_ns == written


def test_llamas_own_programs_weigh_quantize_and_measure_a_model(tmp_path: Path) -> None:
    unquantized, smaller = tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "smaller.gguf"
    text = "the weather in " * 100
    matrix = llama.importance(unquantized, text, tmp_path)
    assert matrix is not None and matrix.stat().st_size > 0
    llama.quantize(unquantized, smaller, "Q8_0", matrix)
    described_alike(smaller, unquantized)
    assert smaller.stat().st_size < unquantized.stat().st_size
    cost = llama.divergence(unquantized, smaller, text, tmp_path)
    assert cost["kl_divergence"] is not None and cost["same_top_share"] is not None
    assert -1e-4 <= cost["kl_divergence"] < 0.02 and cost["same_top_share"] > 0.9


def test_a_model_does_not_diverge_from_itself(tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path / "tiny.gguf")
    cost = llama.divergence(model, model, "the weather in " * 100, tmp_path)
    assert cost["kl_divergence"] == pytest.approx(0, abs=1e-4)
    assert cost["same_top_share"] == pytest.approx(1, abs=0.01)


def test_too_little_text_measures_nothing_rather_than_something_wrong(tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path / "tiny.gguf")
    for _ in range(2):
        assert llama.divergence(model, model, "Too short.", tmp_path) == {
            "kl_divergence": None,
            "same_top_share": None,
        }


def test_figures_that_were_lost_as_a_program_ended_are_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(["perplexity: 0.9 seconds per pass", "Final estimate: PPL = 12.5 +/- 0.1"])
    monkeypatch.setattr(llama, "run_program", lambda *command, errors=True: next(said))
    assert llama.perplexity(tmp_path / "a.gguf", measures.TEXT) == 12.5


def test_an_importance_matrix_needs_two_contexts_and_no_token_more(tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path / "tiny.gguf")
    letters = range(506, 510)  # a token each, after the first mark and a blank of three bytes
    had = [llama.importance(model, "a" * count, tmp_path) is not None for count in letters]
    assert had == [False, False, True, True]


def test_a_count_of_tokens_that_is_not_said_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "run_program", lambda *command, errors=True: "[1, 2]")
    with pytest.raises(llama.LlamaError, match="did not say how many tokens"):
        llama.importance(tmp_path / "a.gguf", "Too short.", tmp_path)


def test_a_program_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(llama.LlamaError, match=r"(?s)llama-quantize ended with 1: .*failed to quantize"):
        llama.quantize(tmp_path / "no-such.gguf", tmp_path / "x", "Q4_K_M")
    with pytest.raises(llama.LlamaError, match=r"llama-tokenize ended with"):
        llama.importance(tmp_path / "no-such.gguf", "a text", tmp_path)


def test_what_importance_is_measured_on_is_not_what_the_divergence_is_measured_on(night: Path) -> None:
    train = night / "dataset" / "train.jsonl"
    numbered = [
        json.dumps(json.loads(line) | {"completion": f"answer {number};<end_of_turn>"})
        for number, line in enumerate(train.read_text().splitlines())
    ]
    train.write_text("\n".join(numbered))
    measured, weighed = quantize.sample_text(night, 0, 1000), quantize.sample_text(night, 1000, 1000)
    answers = [{part.split(";")[0] for part in text.split("answer ")[1:]} for text in (measured, weighed)]
    assert all(answers) and not answers[0] & answers[1]
    assert len(measured) < 1300, "whole examples, and no more than it takes"
    assert quantize.sample_text(night, 100_000, 1000) == ""


COST = {"type": "Q4_K_M", "importance_matrix": False, "kl_divergence": 0.01, "same_top_share": 0.95}


@pytest.mark.parametrize(
    ("cost", "faithful"),
    [
        ({}, True),
        ({"kl_divergence": 0.021}, False),
        ({"same_top_share": 0.89}, False),
        ({"kl_divergence": None, "same_top_share": None}, True),
    ],
)
def test_a_type_is_faithful_when_both_thresholds_hold(cost: dict[str, float], faithful: bool) -> None:
    assert quantize.read_config().faithful(COST | cost) is faithful


class Tools:
    """In place of llama.cpp's programs: files of their type's size, costs as told."""

    def __init__(self, costs: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.costs = costs
        self.asked: list[str] = []
        for name in ("quantize", "importance", "divergence", "speed"):
            monkeypatch.setattr(llama, name, getattr(self, name))
        monkeypatch.setattr(quantize, "merge", lambda base, adapter, folder: folder.mkdir())
        monkeypatch.setattr(quantize, "_convert", lambda folder, gguf: gguf.write_bytes(b"bf16"))
        monkeypatch.setattr(quantize, "with_metadata_of", lambda base, tuned, gguf: gguf.write_bytes(b"bf16"))
        monkeypatch.setattr(quantize, "hugging_face_folder", lambda gguf, state: state)

    def quantize(self, unquantized: Path, quantized: Path, kind: str, importance: Path | None) -> None:
        self.asked.append(kind + ("+" if importance else ""))
        quantized.write_bytes(self.asked[-1].encode())

    def importance(self, unquantized: Path, text: str, scratch: Path) -> Path | None:
        assert "<start_of_turn>" in text
        return scratch / "importance.gguf"

    def divergence(self, unquantized: Path, quantized: Path, text: str, scratch: Path) -> dict[str, float]:
        assert "_of_turn" not in text
        return {"kl_divergence": self.costs[quantized.read_text()], "same_top_share": 0.95}

    def speed(self, gguf: Path) -> dict[str, float]:
        return {"prefill_tokens_per_s": 400.0, "decode_tokens_per_s": 45.0}


@pytest.fixture
def trained(night: Path) -> Path:
    (night / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (night / "adapter" / name).write_bytes(b"weights")
    (night / "base.gguf").write_bytes(b"GGUF")
    return night


def test_the_smallest_faithful_type_is_taken_and_no_larger_one_tried(
    trained: Path, with_importance: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = Tools({"Q4_K_M+": 0.16, "Q5_K_M+": 0.017}, monkeypatch)
    made = quantize.run(trained, trained / "base.gguf", trained, with_importance)
    assert tools.asked == ["Q4_K_M+", "Q5_K_M+"]
    assert (trained / "model.gguf").read_text() == "Q5_K_M+"
    assert (made["type"], made["kl_divergence"], made["sha256"]) == (
        "Q5_K_M",
        0.017,
        cycle.sha256(trained / "model.gguf"),
    )
    assert [each["type"] for each in made["tried"]] == ["Q4_K_M", "Q5_K_M"]


def test_the_table_has_every_type_with_and_without_importance_and_the_same_choice(
    trained: Path, with_importance: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"Q4_K_M+": 0.16, "Q4_K_M": 0.32, "Q5_K_M+": 0.017, "Q5_K_M": 0.03, "Q8_0+": 0.002, "Q8_0": 0.002}
    tools = Tools(costs, monkeypatch)
    made = quantize.run(trained, trained / "base.gguf", trained, with_importance, every_type=True)
    assert tools.asked == list(costs)
    assert made["type"] == "Q5_K_M" and made["importance_matrix"]
    assert all(each["decode_tokens_per_s"] == 45.0 for each in made["tried"])
    assert made["unquantized"] == {
        "size_bytes": len(b"bf16"),
        "prefill_tokens_per_s": 400.0,
        "decode_tokens_per_s": 45.0,
    }


def test_without_importance_the_types_are_tried_as_they_are(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = Tools({"Q4_K_M": 0.01}, monkeypatch)
    made = quantize.run(trained, trained / "base.gguf", trained)
    assert tools.asked == ["Q4_K_M"]
    assert quantize.run(trained, trained / "base.gguf", trained) == made
    assert tools.asked == ["Q4_K_M"], "what is there of the same inputs is not made again"


def test_where_no_type_is_faithful_none_is_written_and_each_ones_cost_is_told(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tools({"Q4_K_M": 0.9, "Q5_K_M": 0.8, "Q8_0": 0.7}, monkeypatch)
    with pytest.raises(quantize.QuantizeError, match=r"Q4_K_M 0\.900.*Q8_0 0\.700.*broken"):
        quantize.run(trained, trained / "base.gguf", trained)
    assert not (trained / "model.gguf").exists()


def test_text_too_short_for_an_importance_matrix_has_none(tmp_path: Path) -> None:
    assert llama.importance(tiny_gguf(tmp_path / "tiny.gguf"), "Too short.", tmp_path) is None


def test_a_base_that_is_not_there_or_not_a_gguf_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(base.BaseModelError, match="set AGENTLOOP_BASE_GGUF"):
        base.hugging_face_folder(tmp_path / "none.gguf", tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(base.BaseModelError, match=r"transformers cannot read .*broken\.gguf"):
        base.hugging_face_folder(tmp_path / "broken.gguf", tmp_path)
    assert not any((tmp_path / "cache").rglob("config.json"))


def test_the_base_can_be_prepared_before_the_first_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setattr(base, "_convert", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    told = CliRunner().invoke(
        app, ["prepare", "--state-dir", str(tmp_path), "--base-gguf", str(gguf), "--json"]
    )
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert Path(found["base"]) == tmp_path / "cache" / "hf" / cycle.sha256(gguf)
    assert found["compute_dtype"] in ("torch.bfloat16", "torch.float32")
    assert (tmp_path / "cache" / "compute.json").is_file()
    told = CliRunner().invoke(app, ["prepare", "--base-gguf", str(tmp_path / "none.gguf")])
    assert told.exit_code == 1 and "AGENTLOOP_BASE_GGUF" in told.stderr


def test_what_a_killed_conversion_of_the_base_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(base, "_convert", convert)
    gguf = tmp_path / "base.gguf"
    gguf.write_bytes(b"GGUF")
    cache = tmp_path / "cache" / "hf"
    left = cache / f".{cycle.sha256(gguf)}.killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert base.hugging_face_folder(gguf, tmp_path) == cache / cycle.sha256(gguf)
    assert sorted(each.name for each in cache.iterdir()) == [".lock", cycle.sha256(gguf)]


def test_without_the_tools_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(llama.LlamaError, match="make install"):
        llama.tool("llama-quantize")
    with pytest.raises(quantize.QuantizeError, match="make install"):
        quantize._convert(tmp_path, tmp_path / "x.gguf")


def test_a_models_perplexity_and_speed_are_measured_once_for_all_that_have_the_same_bytes(
    base_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "_SPEED", ("-p", 8, "-n", 2, "-r", 1))
    short = tmp_path / "half.txt"
    short.write_text(measures.TEXT.read_text()[:2600])
    monkeypatch.setattr(measures, "TEXT", short)
    champion = Subject("champion", "gemma:base", base_gguf, "0" * 64)
    untouched = replace(champion, name="base_constrained")
    found = measures.measure([champion, untouched], ["perplexity", "speed"])
    assert found["champion"] == found["base_constrained"]
    assert 5 < found["champion"]["perplexity"] < 200
    assert found["champion"]["first_token_ms"] > 0 and found["champion"]["tokens_per_s"] > 0
    assert measures.measure([champion], []) == {"champion": {}}


def test_a_program_that_does_not_say_its_figure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "run_program", lambda *command, errors=True: "nothing of note")
    with pytest.raises(llama.LlamaError, match="did not say the perplexity 8 times: nothing of note"):
        llama.perplexity(tmp_path / "a.gguf", measures.TEXT)
    (tmp_path / "logits").write_bytes(bytes(100))
    with pytest.raises(llama.LlamaError, match="did not say the KL divergence"):
        llama.divergence(tmp_path / "a.gguf", tmp_path / "b.gguf", "text", tmp_path)
