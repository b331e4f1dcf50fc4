"""What a host in AWS brings itself up with: a bundle that holds the roles, and a script that plays them."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest
import yaml

from infra.ansible.inventories.aws import hosts
from scripts import host_bundle
from scripts.release import HOME
from tests.imds import imds

SCRIPT = HOME / "infra/terraform/modules/gpu_host/files/bootstrap.sh"
ENVIRONMENT = "stage"
SECRET = "hunter2"


def ansible(folder: Path) -> Path:
    for name in (
        "ansible.cfg",
        "roles/base/tasks/main.yml",
        "playbooks/host.yml",
        "inventories/aws/group_vars/all.yml",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in ("inventories/aws/hosts.py", "inventories/mine/group_vars/all/vault.yml", "library/x.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not this")
    return folder


def test_it_holds_the_roles_and_ansible_and_nobodys_inventory(tmp_path: Path) -> None:
    wheel = tmp_path / "ansible_core-2.19.0-py3-none-any.whl"
    wheel.write_text("")
    name, path = host_bundle.pack(
        ansible(tmp_path / "a"), [wheel], "ansible-core==2.19.0\n", tmp_path / "out"
    )
    assert path.name == f"agentloop-ansible-{name}.tar"
    with tarfile.open(path) as tar:
        assert set(tar.getnames()) == {
            "requirements.txt",
            f"wheels/{wheel.name}",
            "ansible/ansible.cfg",
            "ansible/roles/base/tasks/main.yml",
            "ansible/playbooks/host.yml",
            "ansible/inventories/aws/group_vars/all.yml",
        }
        assert all(entry.mtime == 0 and entry.uid == 0 for entry in tar.getmembers())


def test_its_name_is_that_of_its_content(tmp_path: Path) -> None:
    folder = ansible(tmp_path / "a")
    first = host_bundle.pack(folder, [], "pins", tmp_path / "out")
    assert host_bundle.pack(folder, [], "pins", tmp_path / "out") == first
    (folder / "roles/base/tasks/main.yml").write_text("other")
    second = host_bundle.pack(folder, [], "pins", tmp_path / "out")
    assert second[0] != first[0]
    assert host_bundle.pack(folder, [], "other pins", tmp_path / "out")[0] != second[0]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A machine whose `aws`, `python3 -m venv` and ansible-playbook only write down how they were called."""
    facts = {
        "aws_environment": ENVIRONMENT,
        "aws_region": "us-east-1",
        "aws_bucket": "b",
        "aws_secret": "arn:secret",
        "aws_group": "stage-servers",
        "aws_up_hook": "stage-up",
        "aws_release": "0.1.0-0123456789ab",
        "aws_bundle": "0123456789ab",
    }
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    _, bundle = host_bundle.pack(ansible(tmp_path / "a"), [], "pins", tmp_path / "out")
    programs = {
        "aws": f"""case "$*" in
*"/agentloop-ansible-{facts["aws_bundle"]}.tar "*) cp {bundle} "${{@: -1}}";;
*"get-secret-value"*) echo '{{"redaction_key": "{SECRET}"}}';;
*complete-lifecycle*) exit $HOOK;;
esac""",
        "python3": f"""if [ "$1 $2" != "-m venv" ]; then exec {sys.executable} "$@"; fi
mkdir -p "$4/bin"
cp {tmp_path}/bin/pip {tmp_path}/bin/ansible-playbook "$4/bin/"
""",
        "pip": "",
        "ansible-playbook": f"""cp "{tmp_path}/memory/secrets.json" {tmp_path}/seen
stat -c %a {tmp_path}/memory/secrets.json >{tmp_path}/mode
exit $PLAY""",
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/ran\n{text}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    with imds({"instance-id": ["i-7"], "local-ipv4": ["10.40.128.7"]}) as url:
        yield {
            "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
            "FACTS": f"{tmp_path}/facts.json",
            "HOME_OF_BUNDLE": f"{tmp_path}/home",
            "STATE": f"{tmp_path}/state",
            "MEMORY": f"{tmp_path}/memory",
            "MODELS": f"{tmp_path}/models",
            "IMDS": url,
            "PLAY": "0",
            "HOOK": "0",
        }


def bring_up(host: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT], env=host, capture_output=True, text=True, check=False)


def test_a_host_plays_the_roles_on_itself_and_says_that_it_is_up(
    host: dict[str, str], tmp_path: Path
) -> None:
    done = bring_up(host)
    assert done.returncode == 0, done.stderr
    inventory = yaml.safe_load((tmp_path / "home/inventory/hosts.yml").read_text())
    name = f"i-7.{ENVIRONMENT}.agentloop.internal"
    assert inventory["servers"]["hosts"][name]["ansible_host"] == "10.40.128.7"
    known = Path(hosts.__file__).read_text()
    assert name in known.replace("{instance}", "i-7").replace("{environment}", ENVIRONMENT), (
        "as operators know it"
    )
    assert (tmp_path / "home/inventory/group_vars/all.yml").is_file(), (
        "what inventories/aws says is said here too"
    )
    ran = (tmp_path / "ran").read_text()
    assert (
        ran.index("get-secret-value")
        < ran.index("playbooks/host.yml")
        < ran.index("--lifecycle-hook-name stage-up")
    )
    assert "releases/agentloop-0.1.0-0123456789ab.tar" in ran
    assert (tmp_path / "state/up").exists()
    assert SECRET not in ran + done.stdout + done.stderr


def test_roles_that_fail_leave_the_host_out_of_service_and_no_secret_behind(
    host: dict[str, str], tmp_path: Path
) -> None:
    assert bring_up(host | {"PLAY": "2"}).returncode == 2
    assert SECRET in (tmp_path / "seen").read_text(), "Ansible had them"
    assert (tmp_path / "mode").read_text().strip() == "600", "and they were for root alone"
    assert not (tmp_path / "memory/secrets.json").exists()
    assert "complete-lifecycle-action" not in (tmp_path / "ran").read_text()
    assert not (tmp_path / "state/up").exists()
    assert "Restart=on-failure" in SCRIPT.with_name("bootstrap.service").read_text()


@pytest.mark.soak
def test_it_may_be_run_again_and_a_hook_that_is_younger_than_the_host_stops_nothing(
    host: dict[str, str],
) -> None:
    assert bring_up(host | {"PLAY": "2"}).returncode == 2
    assert bring_up(host).returncode == 0
    done = bring_up(host | {"HOOK": "254"})
    assert done.returncode == 0
    assert "no lifecycle action waited" in done.stdout


@pytest.mark.soak
@pytest.mark.parametrize("facts", ["", "{}", "{half"])
def test_what_it_does_not_know_ends_it_before_anything_is_played(
    host: dict[str, str], tmp_path: Path, facts: str
) -> None:
    (tmp_path / "facts.json").write_text(facts)
    assert bring_up(host).returncode != 0
    assert "ansible-playbook" not in (tmp_path / "ran").read_text()


def test_the_server_is_made_in_its_first_colour_where_no_gateway_says_which_one_serves() -> None:
    roles = HOME / "infra/ansible/roles/server"
    variables = yaml.safe_load((roles / "vars/main.yml").read_text())
    colours = yaml.safe_load((roles / "defaults/main.yml").read_text())["server_colours"]
    render = jinja2.Environment(autoescape=False).from_string
    serving = render(variables["server_serving"]).render(server_seen={"results": []}, inventory_hostname="h")
    assert serving == ""
    other = render(variables["server_other"]).render(server_colours=colours, server_serving=serving)
    gateway = yaml.safe_load((roles.parent / "gateway/defaults/main.yml").read_text())
    assert other.strip() == next(iter(gateway["gateway_colours"])), "with which gateways begin"
    seen = {"results": [{"serves": {"h": "green"}}]}
    assert render(variables["server_serving"]).render(server_seen=seen, inventory_hostname="h") == "green"
