"""From base and adapter to one GGUF that engines can serve, with llama.cpp's own programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFReader
from typer.testing import CliRunner

from training import base, cycle, quantize
from training.__main__ import app


@pytest.fixture(autouse=True)
def a_third_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the divergence is measured on takes most of the time of these tests."""
    monkeypatch.setattr(quantize, "_CHUNKS", 2)


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


def adapter(directory: Path, folder: Path, deviation: float) -> None:
    """An adapter of the real base, of random weights."""
    base.stay_offline()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=deviation)
    adapted.save_pretrained(directory / "adapter")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_base_and_adapter_become_one_gguf_with_the_bases_tokenizer_and_a_small_divergence(
    night: Path, base_gguf: Path
) -> None:
    state = base_gguf.parents[1]
    adapter(night, base.hugging_face_folder(base_gguf, state), 0.002)
    made = quantize.run(night, base_gguf, state)

    assert made["type"] == "Q4_K_M"
    assert made["sha256"] == cycle.sha256(night / "model.gguf")
    assert made["size_bytes"] == (night / "model.gguf").stat().st_size
    assert 0 <= made["kl_divergence"] <= quantize.MOST_DIVERGENCE
    assert made["same_top_share"] > 0.9
    ours, theirs = GGUFReader(night / "model.gguf"), GGUFReader(base_gguf)
    for name in (name for name in theirs.fields if name.startswith("tokenizer.")):
        assert ours.fields[name].contents() == theirs.fields[name].contents(), name
    assert {tensor.name: tuple(tensor.shape) for tensor in ours.tensors} == {
        tensor.name: tuple(tensor.shape) for tensor in theirs.tensors
    }
    assert [path.name for path in night.iterdir() if path.name.startswith(".quantize")] == []

    written = (night / "model.gguf").stat().st_mtime_ns
    command: list[str | Path] = [sys.executable, "-m", "training", "quantize", "--cycle", night]
    command += ["--base-gguf", base_gguf, "--state-dir", state]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Q4_K_M" in again.stdout
    assert (night / "model.gguf").stat().st_mtime_ns == written


def test_a_model_does_not_diverge_from_itself(night: Path, base_gguf: Path, tmp_path: Path) -> None:
    cost = quantize.divergence(base_gguf, base_gguf, quantize.sample_text(night), tmp_path)
    assert cost["kl_divergence"] == pytest.approx(0, abs=1e-4)
    assert cost["same_top_share"] == pytest.approx(1, abs=0.01)


def test_too_little_text_measures_nothing_rather_than_something_wrong(
    base_gguf: Path, tmp_path: Path
) -> None:
    assert quantize.divergence(base_gguf, base_gguf, "Too short.", tmp_path) == {
        "kl_divergence": None,
        "same_top_share": None,
    }


def test_a_program_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(
        quantize.QuantizeError, match=r"(?s)llama-quantize ended with 1: .*failed to quantize"
    ):
        quantize._run(quantize.llama_tool("llama-quantize"), "no-such.gguf", tmp_path / "x", "Q4_K_M")


def test_the_text_that_is_measured_on_holds_no_turn_marks(night: Path) -> None:
    text = quantize.sample_text(night)
    assert "Add 2 and 3." in text
    assert "_of_turn" not in text


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
    with pytest.raises(quantize.QuantizeError, match="make install"):
        quantize.llama_tool("llama-quantize")
    with pytest.raises(quantize.QuantizeError, match="make install"):
        quantize._convert(tmp_path, tmp_path / "x.gguf")
