"""The pipeline does what the Makefile does, in its order, and lets nobody in on the way."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import yaml

from tests.hosts import ROOT

STAGES = ("lint", "types", "unit", "integration", "security", "build", "deploy-staging", "deploy-prod")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pipeline() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/pipeline.yml").read_text())
    return found


def steps(pipeline: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, step) for name, job in pipeline["jobs"].items() for step in job["steps"]]


def stage_jobs(pipeline: dict[str, Any]) -> dict[str, str]:
    made = [
        (found[1], name)
        for name, step in steps(pipeline)
        if (found := re.fullmatch(r"make (\S+).*", step.get("run", "").strip())) and found[1] != "load"
    ]
    assert len(dict(made)) == len(made)
    return dict(made)


def test_each_stage_is_one_target_of_the_makefile(pipeline: dict[str, Any]) -> None:
    assert sorted(stage_jobs(pipeline)) == sorted(STAGES)
    targets = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
    assert set(STAGES) <= targets


def test_make_pipeline_runs_the_first_seven_and_make_ci_what_ci_runs() -> None:
    (named,) = re.findall(r"^STAGES = (.+)$", MAKEFILE, re.MULTILINE)
    assert tuple(named.split()) == STAGES[:-1]
    (ci,) = re.findall(r"^ci: (.+) ##", MAKEFILE, re.MULTILINE)
    assert re.findall(r"^make (.+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE) == ci.split()


def test_nothing_is_deployed_that_was_not_tested_and_built(pipeline: dict[str, Any]) -> None:
    jobs, at = pipeline["jobs"], stage_jobs(pipeline)

    def before(job: str) -> set[str]:
        needs = jobs[job].get("needs", [])
        direct = {needs} if isinstance(needs, str) else set(needs)
        return direct.union(*map(before, direct))

    for earlier, later in itertools.pairwise(STAGES[4:]):
        assert at[earlier] in before(at[later])
    assert {at[stage] for stage in STAGES[:5]} <= before(at["build"])


def test_staging_is_pressed_before_its_proof_goes_on(pipeline: dict[str, Any]) -> None:
    runs = [
        step.get("run") or step["uses"].split("@")[0] for step in pipeline["jobs"]["deploy-staging"]["steps"]
    ]
    assert runs.index("make deploy-staging") < runs.index("make load") < runs.index("actions/upload-artifact")


def test_production_waits_for_people_and_no_two_deploy_at_once(pipeline: dict[str, Any]) -> None:
    production = pipeline["jobs"][stage_jobs(pipeline)["deploy-prod"]]
    staging = pipeline["jobs"][stage_jobs(pipeline)["deploy-staging"]]
    assert production["environment"] == "production"
    assert production["concurrency"] == staging["concurrency"]


def test_actions_are_pinned_rights_are_least_and_forks_stay_out(pipeline: dict[str, Any]) -> None:
    assert pipeline["permissions"] == {}
    for name, job in pipeline["jobs"].items():
        assert job["permissions"] == {"contents": "read"}, name
        assert job["timeout-minutes"] <= 90, name
        assert "self-hosted" in job["runs-on"], name
        if "needs" not in job:
            assert "head.repo.full_name == github.repository" in job["if"], name
    for _, step in steps(pipeline):
        if "uses" in step:
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        # A value from outside that is pasted into a shell's text is run by it.
        assert "${{" not in step.get("run", "")
