"""`agent-loop lineage`: from an answer to the rows its model learned from, from a row to its models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

from agentloop import lineage
from agentloop.cli import app
from agentloop.v1 import log_pb2, log_pb2_grpc
from training import cycle

FIRST, SECOND, THIRD = "20260130T020000Z", "20260131T020000Z", "20260201T020000Z"
OLD, NEW, GATE, ODD, GONE = (f"0197f2a0-0000-7000-8000-00000000000{number}" for number in range(5))
VERSION = "gemma-3-270m:"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVER", "TOKEN", "TOKEN_FILE", "CA_FILE", "CYCLES_DIR"):
        monkeypatch.delenv(f"AGENTLOOP_{name}", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@dataclass
class Log(log_pb2_grpc.LogServiceServicer):
    """A server that knows one inference."""

    answered_by: str = ""
    address: str = ""

    def GetInference(  # noqa: N802
        self, request: log_pb2.GetInferenceRequest, context: grpc.ServicerContext
    ) -> log_pb2.GetInferenceResponse:
        found = log_pb2.Inference(inference_id=request.inference_id, model_version=self.answered_by)
        return log_pb2.GetInferenceResponse(inference=found)

    def ListInferences(  # noqa: N802
        self, request: log_pb2.ListInferencesRequest, context: grpc.ServicerContext
    ) -> log_pb2.ListInferencesResponse:
        return log_pb2.ListInferencesResponse()


@pytest.fixture
def service() -> Iterator[Log]:
    server = grpc.server(ThreadPoolExecutor(1))
    log = Log(address=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    log_pb2_grpc.add_LogServiceServicer_to_server(log, server)
    server.start()
    yield log
    server.stop(0)


def night(folder: Path, name: str, train: list[str], gate: list[str], verdict: str = "pass") -> Path:
    directory = folder / name
    (directory / "dataset").mkdir(parents=True)
    for part, ids in (("train", train), ("gate", gate)):
        text = "".join(json.dumps({"inference_id": each}) + "\n" for each in ids)
        (directory / "dataset" / f"{part}.jsonl").write_text(text)
    sha256 = hashlib.sha256((directory / "dataset" / "train.jsonl").read_bytes()).hexdigest()
    cycle.write_json(directory / "dataset" / "dataset.json", {"excluded_ids": {"too_long": [ODD]}})
    files = {"base": "b" * 64, "train.jsonl": sha256}
    cycle.write_json(directory / "adapter" / "finetune.json", {"inputs": {"files": files}})
    if verdict:
        candidate = {"model_version": VERSION + name, "sha256": "c" * 64}
        gate_record = {"verdict": verdict, "candidate": candidate, "champion": {"model_version": "m:base"}}
        cycle.write_json(directory / "gate.json", gate_record)
    return directory


@pytest.fixture
def cycles(tmp_path: Path) -> Path:
    night(tmp_path, FIRST, [OLD], [GATE], "fail")
    night(tmp_path, SECOND, [OLD, NEW], [GATE])
    tombstone = {
        "id": "e",
        "at": "2026-01-31T09:00:00+00:00",
        "counts": {"train": 1},
        "ids": {"train": [GONE]},
    }
    cycle.write_json(tmp_path / SECOND / "manifest.json", {"erasures": [tombstone]})
    night(tmp_path, THIRD, [NEW], [], "")
    return tmp_path


def call(cycles: Path, *arguments: str, server: str = "") -> Result:
    """Without a server there is no token either, and nobody is asked."""
    options = ["--server", server, "--token", "al_x"] if server else ["--token-file", str(cycles / "none")]
    return CliRunner().invoke(app, [*options, "lineage", *arguments, "--cycles", str(cycles)])


def told(cycles: Path, *arguments: str, server: str = "") -> dict[str, Any]:
    done = call(cycles, *arguments, "--json", server=server)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_model_version_leads_to_the_rows_it_learned_from_and_the_nights_that_brought_them(
    cycles: Path,
) -> None:
    model = told(cycles, VERSION + SECOND)["model"]
    assert model["rows"] == {"train": 2, "gate": 1}
    assert model["new_in"] == [{"cycle_id": FIRST, "rows": 1}, {"cycle_id": SECOND, "rows": 1}]
    assert (model["verdict"], model["judged_against"], model["sha256"]) == ("pass", "m:base", "c" * 64)
    assert model["trained_from_sha256"] == "b" * 64 and model["dataset_as_trained"] is True
    assert model["erased"][0]["counts"] == {"train": 1}
    assert told(cycles, SECOND)["model"] == told(cycles, str(cycles / SECOND))["model"] == model
    assert told(cycles, "last")["model"]["model_version"] == f"of {THIRD}, without a verdict"
    shown = call(cycles, SECOND).stdout
    for text in ("learned from 2 rows", f"1 new in {FIRST}", "erased at 2026-01-31", "verdict pass"):
        assert text in shown


def test_ids_come_in_pages(cycles: Path) -> None:
    assert "ids" not in told(cycles, SECOND)
    page = told(cycles, SECOND, "--ids", "--limit", "1")
    assert (page["ids"], page["next_offset"]) == ([OLD], 1)
    page = told(cycles, SECOND, "--ids", "--limit", "1", "--offset", "1")
    assert (page["ids"], page["next_offset"]) == ([NEW], None)
    shown = call(cycles, SECOND, "--ids", "--limit", "1").stdout
    assert OLD in shown and "more: --offset 1" in shown


def test_a_row_leads_to_every_model_that_learned_from_it_though_no_server_answers(cycles: Path) -> None:
    found = told(cycles, OLD)
    assert found["learned_by"] == [VERSION + FIRST, VERSION + SECOND]
    assert found["answered_by"] is None and found["server_says"]
    assert told(cycles, NEW)["learned_by"] == [VERSION + SECOND, f"of {THIRD}, without a verdict"]
    gate = told(cycles, GATE)
    assert gate["learned_by"] == [] and [one["as"] for one in gate["known_in"]] == ["gate", "gate"]
    assert {one["as"] for one in told(cycles, ODD)["known_in"]} == {"too_long"}
    shown = call(cycles, OLD).stdout
    assert "which version answered is not known" in shown and VERSION + SECOND in shown


def test_a_row_that_was_erased_leads_to_its_models_by_the_tombstone(cycles: Path) -> None:
    (one,) = told(cycles, GONE)["known_in"]
    assert (one["as"], one["learned_by"]) == ("train", VERSION + SECOND)
    assert one["erased_at"] == "2026-01-31T09:00:00+00:00"


def test_an_answer_leads_to_what_its_model_learned(cycles: Path, service: Log) -> None:
    service.answered_by = VERSION + FIRST
    found = told(cycles, NEW, "--ids", server=service.address)
    assert found["answered_by"] == VERSION + FIRST
    assert found["model"]["rows"]["train"] == 1 and found["ids"] == [OLD]
    assert found["learned_by"] == [VERSION + SECOND, f"of {THIRD}, without a verdict"]
    assert f"answered by {VERSION + FIRST}" in call(cycles, NEW, server=service.address).stdout
    service.answered_by = "gemma-3-270m:base"
    assert told(cycles, NEW, server=service.address)["model"] is None
    assert "no row is known that it learned from" in call(cycles, NEW, server=service.address).stdout


def test_the_untouched_base_learned_from_nothing(cycles: Path) -> None:
    assert told(cycles, "gemma-3-270m:base") == {"model": None, "model_version": "gemma-3-270m:base"}


def test_what_nobody_made_is_not_found(cycles: Path) -> None:
    assert call(cycles, "gemma-3-270m:20300101T000000Z").exit_code == 4
    assert call(cycles, "20300101T000000Z").exit_code == 4
    assert call(cycles, "something").exit_code == 2


def test_damage_is_told_and_stops_nothing(cycles: Path) -> None:
    with (cycles / SECOND / "dataset" / "train.jsonl").open("ab") as file:
        file.write(b'\x00\xff\n{"inference_id": 7}\n{"inference_id": "cut')
    (cycles / FIRST / "dataset" / "dataset.json").write_text('{"excluded_ids": [1]}')
    (cycles / THIRD / "dataset" / "dataset.json").write_text('{"excluded_ids": {"x": 3}}')
    cycle.write_json(cycles / THIRD / "manifest.json", {"erasures": [{"ids": 3}, {"ids": {"train": 7}}]})
    model = told(cycles, SECOND)["model"]
    assert model["rows"]["train"] == 2 and model["dataset_as_trained"] is False
    assert model["problems"][0].startswith("dataset/train.jsonl has 2 lines")
    shown = call(cycles, SECOND).stdout
    assert "no longer has the bytes" in shown and "problem: dataset/train.jsonl" in shown
    assert told(cycles, OLD)["learned_by"] == [VERSION + FIRST, VERSION + SECOND]
    (cycles / FIRST / "dataset" / "train.jsonl").unlink()
    assert lineage.of_cycle(cycles / FIRST)["dataset_as_trained"] is False
    cycle.write_json(cycles / FIRST / "adapter" / "finetune.json", {"inputs": 3})
    assert lineage.of_cycle(cycles / FIRST)["dataset_as_trained"] is None


def test_a_cycle_that_trained_nothing_taught_nobody(tmp_path: Path) -> None:
    (tmp_path / FIRST).mkdir()
    assert lineage.learned_by(tmp_path / FIRST) == ""
