#!/usr/bin/env python3
"""The servers of an environment in AWS, as Ansible's dynamic inventory.

    AGENTLOOP_ENVIRONMENT=stage ansible-playbook playbooks/site.yml --inventory inventories/aws ...

Terraform's output `inventory` names the autoscaling group, the database and the network; AWS is asked
which of the group's instances are in service, and for their addresses. A host that comes up, or is
drained, is left out. It needs `terraform` and `aws`, with rights to read. Standard library only: Ansible
runs it with any Python 3.

Settings: AGENTLOOP_ENVIRONMENT (stage, prod). Exit: 0 printed, 1 a command failed, 2 the environment is
wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TERRAFORM = Path(__file__).resolve().parents[3] / "terraform"
ENVIRONMENTS = ("stage", "prod")
SECONDS = 120
# Hosts have no SSH port: Session Manager is the way in.
PROXY = (
    "-o ProxyCommand='aws ssm start-session --region {region} --target {instance}"
    " --document-name AWS-StartSSHSession --parameters portNumber=%p'"
)


class InventoryError(Exception):
    """The hosts cannot be told; the text says why."""


def inventory(environment: str) -> dict[str, Any]:
    """Ansible's `--list`: group `servers`, what is the same for all hosts, and each host's own variables.

    Raises:
        InventoryError: if a command fails, or answers something else.
    """
    outputs = _json(["terraform", f"-chdir={TERRAFORM / environment}", "output", "-json", "inventory"])
    try:
        region, group = outputs["aws_region"], outputs["aws_group"]
        aws = ["aws", "--region", region, "--output", "json"]
        answer = _json(
            [*aws, "autoscaling", "describe-auto-scaling-groups", "--auto-scaling-group-names", group]
        )
        serving = sorted(
            each["InstanceId"]
            for one in answer["AutoScalingGroups"]
            for each in one["Instances"]
            if each["LifecycleState"] == "InService"
        )
        found = _json([*aws, "ec2", "describe-instances", "--instance-ids", *serving]) if serving else {}
        addresses = {
            each["InstanceId"]: each["PrivateIpAddress"]
            for one in found.get("Reservations", [])
            for each in one["Instances"]
            if each["State"]["Name"] == "running"
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InventoryError(
            f"an answer lacks {error}: is `terraform apply` of {environment} done?"
        ) from error
    hosts = {
        f"{instance}.{environment}.agentloop.internal": _variables(instance, address, region)
        for instance, address in addresses.items()
    }
    return {
        "all": {"vars": outputs},
        "servers": {"hosts": list(hosts)},
        "_meta": {"hostvars": hosts},
    }


def _variables(instance: str, address: str, region: str) -> Mapping[str, str]:
    return {
        "ansible_host": address,
        "aws_instance": instance,
        "ansible_ssh_common_args": PROXY.format(region=region, instance=instance),
    }


def _json(command: Sequence[str]) -> Any:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InventoryError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise InventoryError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise InventoryError(f"{command[0]} printed no JSON") from error


def main(given: Sequence[str] | None = None) -> int:
    """Print what Ansible asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description="The servers of an environment in AWS, for Ansible.")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--list", action="store_true", help="all groups and hosts, as JSON")
    asked.add_argument("--host", help="one host's variables: all are in --list")
    arguments = parser.parse_args(given)
    environment = os.environ.get("AGENTLOOP_ENVIRONMENT", "")
    if environment not in ENVIRONMENTS:
        wanted = " or ".join(ENVIRONMENTS)
        print(f"AGENTLOOP_ENVIRONMENT is {environment!r}; it must be {wanted}", file=sys.stderr)
        return 2
    try:
        print(json.dumps({} if arguments.host else inventory(environment), indent=2, sort_keys=True))
    except InventoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
