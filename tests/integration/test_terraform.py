"""infra/terraform, checked by Terraform itself: with mocks of AWS, and applied to a stand-in (moto)."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from tests.live_server import ROOT

SCRIPT = ROOT / "scripts" / "terraform.sh"
MODULES = sorted(path for path in (ROOT / "infra" / "terraform" / "modules").iterdir() if path.is_dir())
ENVIRONMENTS = ("stage", "prod")
HAS_PROVIDER = pytest.mark.skipif(
    "TF_PLUGIN_DIR" not in os.environ or shutil.which("terraform") is None,
    reason="no folder with the AWS provider (TF_PLUGIN_DIR), which no package registry has",
)
YOURS = {
    "TF_VAR_ami_id": "ami-0123456789abcdef0",
    "TF_VAR_release": "0.1.0-0123456789ab",
    "TF_VAR_bundle": "0123456789ab",
    "TF_VAR_emails": '["sre@example.org"]',
}
# moto's S3 is at one address for all buckets, and needs no account.
PROVIDER = """
provider "aws" {
  s3_use_path_style           = true
  skip_credentials_validation = true
  skip_metadata_api_check     = true
}
"""

# moto cannot say who is told of a budget (DescribeSubscribersForNotification), which the provider asks: a
# budget is planned with mocks alone.
NO_BUDGET = """
resource "aws_budgets_budget" "this" {
  count = 0
}
"""
# What moto 5.2.5 does not keep, or answers by itself, so that a second plan would put it right.
MOTO_LOSES = {
    "aws_db_parameter_group": {"parameter"},
    "aws_vpc_security_group_ingress_rule": {"description"},
    "aws_autoscaling_group": {
        "capacity_reservation_specification",
        "default_instance_warmup",
        "mixed_instances_policy",
    },
    "aws_autoscaling_lifecycle_hook": {"notification_target_arn", "role_arn"},
    "aws_launch_template": {"default_version", "latest_version", "tag_specifications"},
}


def test_without_the_provider_it_is_told_in_one_line_that_nothing_was_tested(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TF_PLUGIN_DIR"}
    done = subprocess.run(
        [SCRIPT], env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "TF_PLUGIN_DIR: is not set" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_each_variable_that_a_module_checks_is_refused_in_a_test_of_it(module: Path) -> None:
    tests = "\n".join(file.read_text() for file in (module / "tests").glob("*.tftest.hcl"))
    assert "mock_provider" in tests
    refused = set(re.findall(r"expect_failures = \[var\.(\w+)\]", tests))
    variables = re.split(r"^variable ", (module / "variables.tf").read_text(), flags=re.MULTILINE)[1:]
    assert refused == {text.split('"')[1] for text in variables if "validation {" in text}
    assert tests.count('\nrun "') > tests.count("expect_failures"), "and something is taken"


def test_stage_and_prod_differ_in_their_numbers_and_names_alone() -> None:
    stage, prod = (ROOT / "infra/terraform" / name for name in ENVIRONMENTS)
    for name in ("main.tf", "variables.tf", "outputs.tf"):
        ours, theirs = (
            (folder / name).read_text().replace(f'"{folder.name}', '"').splitlines()[name == "main.tf" :]
            for folder in (stage, prod)
        )
        assert ours == theirs
    settings = [yaml.safe_load((folder / "settings.yaml").read_text()) for folder in (stage, prod)]
    assert set(settings[0]) == set(settings[1])
    assert settings[1]["multi_az"], "prod has a standby"
    assert not settings[1]["destroyable"]
    assert settings[1]["min_hosts"] >= 2, "and does not hang on one host"


def test_states_are_encrypted_and_locked_and_no_bucket_is_somebodys() -> None:
    for name in ENVIRONMENTS:
        text = (ROOT / "infra/terraform" / name / "main.tf").read_text()
        (backend,) = re.findall(r'backend "s3" \{(.*?)\}', text, flags=re.DOTALL)
        assert re.search(r"use_lockfile = true", backend)
        assert re.search(r"encrypt\s+= true", backend)
        assert "bucket" not in backend


@pytest.mark.soak
@pytest.mark.timeout(1800)
@HAS_PROVIDER
def test_every_module_is_valid_and_its_tests_pass() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("The configuration is valid") == len(MODULES) + len(ENVIRONMENTS) + 1
    assert " 0 passed" not in done.stdout


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_nothing_is_unsafe_that_has_no_reason_beside_it() -> None:
    checkov = tool("checkov") / "checkov"
    command = [
        str(checkov),
        "--skip-download",
        "--framework=terraform",
        "--quiet",
        "--compact",
        "--output=json",
    ]
    done = subprocess.run(
        [*command, f"--directory={ROOT / 'infra/terraform'}"], capture_output=True, text=True, check=False
    )
    told = json.loads(done.stdout)
    found = told["results"]["failed_checks"]
    assert not found, "\n".join(f"{one['check_id']} {one['resource']}: {one['check_name']}" for one in found)
    assert done.returncode == 0, done.stderr
    assert told["summary"]["passed"] > 100
    assert told["summary"]["parsing_errors"] == 0
    for file in (ROOT / "infra/terraform").rglob("*.tf"):
        for check, reason in re.findall(r"#checkov:skip=(\w+):?(.*)", file.read_text()):
            assert len(reason) > 40, f"{file}: {check} says no reason"


def tool(name: str) -> Path:
    """The folder of its programs, installed if need be."""
    done = subprocess.run(
        [ROOT / "scripts/cloud_tool.sh", name], stdout=subprocess.PIPE, text=True, check=True
    )
    return Path(done.stdout.strip())


class Account:
    """An account of AWS that moto plays, and Terraform in a copy of infra/."""

    def __init__(self, folder: Path, url: str, programs: Path) -> None:
        self.infra = folder / "infra"
        shutil.copytree(
            ROOT / "infra", self.infra, ignore=shutil.ignore_patterns(".terraform*", "__pycache__")
        )
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder),
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "moto",
            "AWS_SECRET_ACCESS_KEY": "moto",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "TF_CLI_CONFIG_FILE": "/dev/null",
            "TF_IN_AUTOMATION": "1",
            "CHECKPOINT_DISABLE": "1",
            "NO_PROXY": "127.0.0.1",
        }
        for name in ("bootstrap", *ENVIRONMENTS):
            (self.infra / "terraform" / name / "moto_override.tf").write_text(PROVIDER)
        (self.infra / "terraform/modules/observability/moto_override.tf").write_text(NO_BUDGET)

    def run(self, *command: str | Path, wanted: int | None = 0, more: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            env=self.environment | dict(more or {}),
            capture_output=True,
            text=True,
            check=False,
            cwd=self.infra,
        )
        assert wanted is None or done.returncode == wanted, done.stdout[-6000:] + done.stderr[-6000:]
        return done.stdout + done.stderr

    def terraform(
        self, name: str, *command: str, wanted: int = 0, more: Mapping[str, str] | None = None
    ) -> str:
        folder = self.infra / "terraform" / name
        return self.run("terraform", f"-chdir={folder}", *command, "-no-color", wanted=wanted, more=more)

    def init(self, name: str, *more: str) -> None:
        plugins = Path(os.environ["TF_PLUGIN_DIR"]).resolve()
        self.terraform(name, "init", "-input=false", f"-plugin-dir={plugins}", *more)

    def aws(self, *command: str) -> Any:
        said = self.run("aws", "--output", "json", *command)
        return json.loads(said) if said.strip() else None


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    programs = tool("moto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("account")
    url = f"http://127.0.0.1:{port}"
    with (folder / "moto.log").open("w") as log:
        server = subprocess.Popen(
            [programs / "moto_server", "-H", "127.0.0.1", "-p", str(port)],
            env=os.environ | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/moto-api/", timeout=1, trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield Account(folder, url, programs)
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@HAS_PROVIDER
def test_the_bucket_of_the_states_is_made_and_left_alone(account: Account) -> None:
    account.init("bootstrap")
    states = {"TF_VAR_bucket": "agentloop-states-made", "TF_VAR_region": "us-east-1"}
    account.terraform("bootstrap", "apply", "-auto-approve", more=states)
    account.terraform("bootstrap", "plan", "-detailed-exitcode", more=states)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@HAS_PROVIDER
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_is_planned_applied_left_alone_and_destroyed(account: Account, name: str) -> None:
    yours = YOURS | {"TF_VAR_bucket": f"agentloop-{name}-moto"}
    # Not the bucket that bootstrap makes: moto takes "refused without TLS" for "refused".
    account.run("aws", "s3", "mb", "s3://agentloop-states", wanted=None)
    account.init(
        name,
        "-backend-config=bucket=agentloop-states",
        "-backend-config=region=us-east-1",
        "-backend-config=use_path_style=true",
        "-backend-config=skip_credentials_validation=true",
    )
    account.terraform(name, "plan", "-out=plan", "-input=false", more=yours)
    _somebody_else_is_at_work(account, name, yours)
    account.terraform(name, "apply", "-input=false", "plan", more=yours)
    account.terraform(name, "plan", "-out=again", "-input=false", more=yours)
    _nothing_is_left_to_do(json.loads(account.terraform(name, "show", "-json", "again")))
    _user_data_is_what_cloud_init_takes(account, name)
    _hosts_are_in_the_inventory(account, name)
    _no_secret_is_in_the_state(account, name)
    destroy = ("destroy", "-auto-approve", "-input=false")
    if name == "prod":
        said = account.terraform(name, *destroy, wanted=1, more=yours)
        assert "deletion" in said.lower(), "prod is not destroyed by mistake"
    else:
        account.terraform(name, *destroy, more=yours)
        assert account.terraform(name, "state", "list") == ""


def _nothing_is_left_to_do(plan: dict[str, Any]) -> None:
    """Nothing but what moto forgets, or makes up."""
    for one in plan["resource_changes"]:
        change = one["change"]
        if change["actions"] == ["no-op"] or one["mode"] == "data":
            continue
        assert change["actions"] == ["update"], one["address"]
        before, after = change["before"], change["after"]
        changed = {key for key in before if before[key] != after.get(key)}
        changed |= {key for key, unknown in change["after_unknown"].items() if "true" in json.dumps(unknown)}
        assert changed <= MOTO_LOSES.get(one["type"], set()), f"{one['address']}: {changed}"


def _somebody_else_is_at_work(account: Account, name: str, yours: dict[str, str]) -> None:
    lock = f"s3://agentloop-states/{name}/terraform.tfstate.tflock"
    held = account.infra / "lock.json"
    held.write_text(json.dumps({"ID": "1", "Operation": "apply", "Who": "ada@laptop", "Version": "1.11.4"}))
    account.run("aws", "s3", "cp", held, lock)
    said = account.terraform(name, "plan", "-input=false", wanted=1, more=yours)
    assert "Error acquiring the state lock" in said
    assert "ada@laptop" in said
    account.run("aws", "s3", "rm", lock)


def _user_data_is_what_cloud_init_takes(account: Account, name: str) -> None:
    (template,) = account.aws(
        "ec2",
        "describe-launch-template-versions",
        f"--launch-template-name={name}-servers",
        "--versions=$Latest",
    )["LaunchTemplateVersions"]
    text = base64.b64decode(template["LaunchTemplateData"]["UserData"]).decode()
    assert text.startswith("#cloud-config\n")
    config = yaml.safe_load(text)
    jsonschema.Draft4Validator(_schema_of_cloud_init()).validate(config)
    facts = json.loads(config["write_files"][0]["content"])
    assert facts["aws_environment"] == name
    assert facts["database_address"]
    for file in config["write_files"]:
        if file["content"].startswith("#!"):
            subprocess.run(["bash", "-n"], input=file["content"], text=True, check=True)


def _schema_of_cloud_init() -> Any:
    """That of Debian's cloud-init, which is not installed for it: it would act at the next boot."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentloop" / "cloud-init"
    if not list(folder.glob("*.deb")):
        folder.mkdir(parents=True, exist_ok=True)
        if subprocess.run(["apt-get", "download", "cloud-init"], cwd=folder, check=False).returncode != 0:
            subprocess.run(["apt-get", "update", "-q"], check=True)
            subprocess.run(["apt-get", "download", "cloud-init"], cwd=folder, check=True)
    (package,) = folder.glob("*.deb")
    tree = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, check=True).stdout
    wanted = "./usr/lib/python3/dist-packages/cloudinit/config/schemas/schema-cloud-config-v1.json"
    done = subprocess.run(
        ["tar", "--extract", "--to-stdout", wanted], input=tree, capture_output=True, check=True
    )
    return json.loads(done.stdout)


def _hosts_are_in_the_inventory(account: Account, name: str) -> None:
    settings = yaml.safe_load((account.infra / "terraform" / name / "settings.yaml").read_text())
    said = account.run(
        Path(sys.executable).with_name("ansible-inventory"),
        "--inventory=ansible/inventories/aws",
        "--list",
        more={"AGENTLOOP_ENVIRONMENT": name, "ANSIBLE_HOME": str(account.infra / "ansible-home")},
    )
    told = json.loads(said[said.index("{") :])
    hosts = told["servers"]["hosts"]
    assert len(hosts) == settings["min_hosts"]
    for host in hosts:
        assert re.fullmatch(rf"i-[0-9a-f]+\.{name}\.agentloop\.internal", host)
        variables = told["_meta"]["hostvars"][host]
        assert variables["ansible_host"].startswith(settings["cidr"].rsplit(".", 2)[0])
        assert variables["site_network"] == [settings["cidr"]]
        assert variables["base_open"], "what inventories/aws says of servers"


def _no_secret_is_in_the_state(account: Account, name: str) -> None:
    state = json.loads(account.terraform(name, "state", "pull"))
    for resource in state["resources"]:
        for instance in resource["instances"]:
            for key, value in instance["attributes"].items():
                if re.search(r"(^|_)(password|secret_string|private_key|token)$", key):
                    assert isinstance(value, bool) or not value, f"{resource['type']}.{key} is in the state"
