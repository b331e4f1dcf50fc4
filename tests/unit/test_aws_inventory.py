"""Ansible's hosts in AWS are those of the group that serve, by what `terraform` and `aws` answer."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.ansible.inventories.aws import hosts

OUTPUTS = {
    "aws_environment": "stage",
    "aws_region": "us-east-1",
    "aws_group": "stage-servers",
    "database_address": "stage.example",
    "site_network": ["10.40.0.0/16"],
}
INSTANCES = [
    {"InstanceId": "i-1", "LifecycleState": "InService"},
    {"InstanceId": "i-2", "LifecycleState": "Pending:Wait"},
    {"InstanceId": "i-3", "LifecycleState": "Terminating:Wait"},
    {"InstanceId": "i-4", "LifecycleState": "InService"},
]
FOUND = [
    {"InstanceId": "i-1", "PrivateIpAddress": "10.40.128.1", "State": {"Name": "running"}},
    {"InstanceId": "i-4", "PrivateIpAddress": "10.40.128.4", "State": {"Name": "shutting-down"}},
]


class Answers:
    """Programs `terraform` and `aws` on PATH, which answer by a word of what they are asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = folder / "asked"
        self.given: dict[str, Any] = {
            "output": OUTPUTS,
            "describe-auto-scaling-groups": {"AutoScalingGroups": [{"Instances": INSTANCES}]},
            "describe-instances": {"Reservations": [{"Instances": FOUND}]},
        }
        self.put()

    def put(self, **changed: Any) -> None:
        self.given |= {word.replace("_", "-"): answer for word, answer in changed.items()}
        cases = "".join(
            f"*\\ {word}\\ *) echo {shlex.quote(text if isinstance(text, str) else json.dumps(text))};;\n"
            for word, text in self.given.items()
        )
        for name in ("terraform", "aws"):
            program = self.folder / name
            program.write_text(
                f'#!/bin/bash\necho "$0 $*" >>{self.asked}\ncase " $* " in\n{cases}'
                "*) echo refused >&2; exit 4;;\nesac\n"
            )
            program.chmod(0o755)


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    monkeypatch.setenv("AGENTLOOP_ENVIRONMENT", "stage")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Answers(tmp_path)


def test_servers_are_the_instances_in_service(answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    assert hosts.main(["--list"]) == 0
    told = json.loads(capsys.readouterr().out)
    name = "i-1.stage.agentloop.internal"
    assert told["servers"] == {"hosts": [name]}
    assert told["_meta"]["hostvars"][name]["ansible_host"] == "10.40.128.1"
    assert "--target i-1" in told["_meta"]["hostvars"][name]["ansible_ssh_common_args"]
    assert told["all"]["vars"]["database_address"] == "stage.example"
    asked = answers.asked.read_text()
    assert "--instance-ids i-1 i-4" in asked, "and nobody else is asked for"
    assert "--region us-east-1" in asked


def test_a_group_without_hosts_has_none(answers: Answers) -> None:
    answers.put(describe_auto_scaling_groups={"AutoScalingGroups": []})
    assert hosts.inventory("stage")["servers"] == {"hosts": []}
    assert "describe-instances" not in answers.asked.read_text(), "an empty list would ask for all"


def test_a_hosts_variables_are_all_in_the_list(answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    assert hosts.main(["--host", "i-1.stage.agentloop.internal"]) == 0
    assert json.loads(capsys.readouterr().out) == {}
    assert not answers.asked.exists()


@pytest.mark.parametrize(
    ("word", "answer", "said"),
    [
        ("output", {}, "is `terraform apply` of stage done?"),
        ("output", "null", "is `terraform apply` of stage done?"),
        ("output", "Error: none", "printed no JSON"),
        ("describe-auto-scaling-groups", {"AutoScalingGroups": [{}]}, "'Instances'"),
        ("describe-instances", {"Reservations": [{"Instances": [{"InstanceId": "i-1"}]}]}, "lacks"),
    ],
)
def test_an_answer_that_is_another_is_told(
    answers: Answers, capsys: pytest.CaptureFixture[str], word: str, answer: Any, said: str
) -> None:
    answers.put(**{word: answer})
    assert hosts.main(["--list"]) == 1
    assert said in capsys.readouterr().err


def test_a_command_that_fails_or_is_missing_is_told_in_its_words(
    answers: Answers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del answers.given["describe-auto-scaling-groups"]
    answers.put()
    assert hosts.main(["--list"]) == 1
    assert "aws failed (4): refused" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nonexistent")
    assert hosts.main(["--list"]) == 1
    assert "terraform" in capsys.readouterr().err


@pytest.mark.parametrize("environment", ["", "Stage", "../prod"])
def test_no_other_environment_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: str
) -> None:
    monkeypatch.setenv("AGENTLOOP_ENVIRONMENT", environment)
    assert hosts.main(["--list"]) == 2
    assert "stage or prod" in capsys.readouterr().err


def test_every_fact_that_roles_use_is_told_by_terraform_to_both() -> None:
    """A host that comes up has its facts from user data, an operator's machine from the output: one set."""
    terraform = hosts.TERRAFORM / "modules"
    user_data = (terraform / "gpu_host/main.tf").read_text()
    output = (terraform / "environment/outputs.tf").read_text()
    group = hosts.TERRAFORM.parent / "ansible/inventories/aws/group_vars"
    used = yaml.safe_load((group / "servers.yml").read_text())
    for fact in ("database_address", "site_network"):
        assert fact in str(used)
        assert f"{fact} " in user_data
        assert f"{fact} " in output
