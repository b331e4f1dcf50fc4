"""The list of models that a night trains, and that nothing is kept or erased for one of them alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from agentloop import lineage
from agentloop.night import every_cycle, folders_of_cycles
from grpc_server.adapters.learned import learned
from tests.unit.test_retain import NAME, NIGHTS, Server, night
from training import cycle, erase, models, recipe, retain
from training.__main__ import app


def written(tmp_path: Path, *entries: str) -> Path:
    (tmp_path / "base.gguf").touch()
    file = tmp_path / "models.yaml"
    rest = f"recipe: {recipe.DEFAULT}, base: {tmp_path / 'base.gguf'}"
    file.write_text("models:\n" + "".join(f"  - {{{entry}, {rest}}}\n" for entry in entries))
    return file


def test_the_first_model_keeps_the_cycles_folder_and_each_other_has_one_in_it(tmp_path: Path) -> None:
    file = written(tmp_path, "model: gemma-3-270m, alias: default", "model: gemma-3-1b, alias: agent")
    done = CliRunner().invoke(app, ["models", "--models", str(file), "--cycles", str(tmp_path / "cycles")])
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    first, second = json.loads(line)
    assert (first["model"], first["alias"], first["cycles"]) == (
        "gemma-3-270m",
        "default",
        str(tmp_path / "cycles"),
    )
    assert second["cycles"] == str(tmp_path / "cycles" / "gemma-3-1b")
    assert second["base"] == str(tmp_path / "base.gguf") and Path(second["recipe"]).is_file()


def test_the_list_that_is_shipped_names_the_model_that_is_the_default() -> None:
    shipped = models.Models.model_validate(yaml.safe_load((recipe.CONFIGS / "night-models.yaml").read_text()))
    (only,) = shipped.models
    assert (only.model, only.alias) == ("gemma-3-270m", "default")
    assert only.recipe.resolve() == recipe.DEFAULT


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ((), "models"),
        (("model: a, alias: x", "model: a, alias: y"), "two models have the model a"),
        (("model: a, alias: x", "model: b, alias: x"), "two models have the alias x"),
        (("model: ../a, alias: x",), "models.0.model"),
        (("model: a, alias: x, colour: red",), "colour"),
        (("model: 'a\\0', alias: x",), "models.0.model"),
        (("model: a",), "models.0.alias"),
        (("model: a, alias: x, recipe: /nowhere",), "the recipe of a is not there: /nowhere"),
    ],
)
def test_a_list_that_is_wrong_is_refused_with_the_entry(
    tmp_path: Path, entries: tuple[str, ...], said: str
) -> None:
    file = written(tmp_path, *entries)
    if "/nowhere" in said:
        file.write_text(file.read_text().replace(f", recipe: {recipe.DEFAULT}", ""))
    done = CliRunner().invoke(app, ["models", "--models", str(file)])
    assert done.exit_code == 1 and said in done.stderr and "Traceback" not in done.output


def test_a_list_that_is_no_yaml_or_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("{")
    for file in ("models.yaml", "none.yaml"):
        done = CliRunner().invoke(app, ["models", "--models", str(tmp_path / file)])
        assert done.exit_code == 1 and file in done.stderr and "Traceback" not in done.output


@pytest.fixture
def cycles(tmp_path: Path) -> Path:
    """Two models that have learned of the same rows, in the same nights."""
    folder = tmp_path / "cycles"
    for name in NIGHTS[:2]:
        night(folder, name)
        made = night(folder / "gemma-3-1b", name)
        gate = cycle.read_json(made / "gate.json")
        gate["candidate"]["model_version"] = f"gemma-3-1b:{name}"
        cycle.write_json(made / "gate.json", gate)
    (folder / "notes").mkdir()
    (folder / "a file").touch()
    return folder


def test_lineage_and_erasure_reach_the_cycles_of_every_model(cycles: Path) -> None:
    assert folders_of_cycles(cycles) == [cycles, cycles / "gemma-3-1b"]
    assert [each.name for each in every_cycle(cycles)] == [NIGHTS[0], NIGHTS[0], NIGHTS[1], NIGHTS[1]]
    versions = lineage.versions(lineage.of_row(f"{NIGHTS[0]}-learned", cycles))
    assert versions == [NAME + NIGHTS[0], f"gemma-3-1b:{NIGHTS[0]}"]
    assert lineage.made_by(f"gemma-3-1b:{NIGHTS[1]}", cycles) == cycles / "gemma-3-1b" / NIGHTS[1]
    assert lineage.made_by(NAME + NIGHTS[1], cycles) == cycles / NIGHTS[1]
    found = erase.run(cycles, erase.Erasure("id", erase.Subject("learned"), "me"))
    learned_by = {f"{model}:{name}" for model in ("gemma-3-270m", "gemma-3-1b") for name in NIGHTS[:2]}
    assert set(found["learned_by"]) == learned_by
    for each in every_cycle(cycles):
        assert (each / "dataset" / "train.jsonl").read_text() == ""


def test_old_cycles_of_every_model_give_their_disk_back(cycles: Path) -> None:
    found = retain.run_all(cycles, 1, Server())  # type: ignore[arg-type]
    assert [one["model_version"] for one in found["cycles"]] == [NAME + NIGHTS[0], f"gemma-3-1b:{NIGHTS[0]}"]
    assert not list(cycles.rglob(f"{NIGHTS[0]}/model.gguf")) and len(list(cycles.rglob("model.gguf"))) == 2
    assert "gemma-3-1b" in str(found["removed"]) and found["bytes"] > 0


def test_a_month_of_the_log_goes_when_every_model_has_learned_it(cycles: Path) -> None:
    def frozen(folder: Path, reached: int) -> None:
        record = {"watermark_to": str(reached), "system_identifier": "1", "database_oid": "2"}
        cycle.write_json(folder / NIGHTS[1] / "snapshot" / "snapshot.json", record)

    for folder in (cycles, cycles / "gemma-3-1b"):
        for name in NIGHTS[:1]:
            (folder / name / "gate.json").unlink()
    frozen(cycles, 900)
    frozen(cycles / "gemma-3-1b", 400)
    known = learned(cycles)
    assert known is not None and known.xid == 400
    (cycles / "gemma-3-1b" / NIGHTS[1] / "gate.json").unlink()
    assert learned(cycles) is None, "one of them has learned nothing yet"
    for name in NIGHTS[:2]:
        (cycles / name).rename(cycles / "notes" / f"was {name}")
    cycle.write_json(cycles / "gemma-3-1b" / NIGHTS[1] / "gate.json", {})
    known = learned(cycles)
    assert known is not None and known.xid == 400, "where the folder itself has no cycles, theirs count alone"
