#!/usr/bin/python
"""Ansible module: where an alias leads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from ansible.module_utils.agentloop_cli import CONFLICT, CONNECTION, CommandFailedError, agent_loop
from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: agentloop_route
short_description: Read or change where an alias leads
description:
  - Reads or changes a route, through C(agent-loop route). Every change is a compare-and-set, so of two
    rollouts at once one gets a conflict, and neither undoes the other's work unseen.
  - Shadows are left as they are, except that a version that becomes stable or canary is no shadow any more.
version_added: "0.1.0"
options:
  alias:
    description: The name that callers use.
    type: str
    default: default
  state:
    description:
      - C(read) changes nothing.
      - C(canary) gives I(model_version) the share I(weight), and the rest to the stable version.
      - C(stable) gives I(model_version) everything.
      - C(restored) puts I(targets) back, if the route still is as this rollout of I(model_version) left it.
    type: str
    choices: [read, canary, stable, restored]
    default: read
  model_version:
    description: The version that the change is about. Required unless I(state=read).
    type: str
  weight:
    description: The canary's share in whole percent, 1 to 99.
    type: int
    default: 10
  targets:
    description: What to restore. Required if I(state=restored).
    type: list
    elements: dict
    suboptions:
      model_version:
        description: The version.
        type: str
        required: true
      role:
        description: C(stable), C(canary) or C(shadow).
        type: str
        required: true
      weight:
        description: Whole percent.
        type: int
        required: true
  revision:
    description:
      - The revision that the change replaces; 0 for the one in force. A route that moved on is a conflict.
      - With I(state=restored) the last revision that this rollout knows of. A later one is put back only if
        it is the next and leads to I(model_version), which is what this rollout's own change looks like if
        the server's answer was lost.
    type: int
    default: 0
  server:
    description: Address of the server; empty for the one that C(agent-loop) finds itself.
    type: str
    default: ""
  token_file:
    description: File that holds a token with the scopes C(models:read) and C(models:write).
    type: path
  command:
    description: The C(agent-loop) to run.
    type: path
    default: agent-loop
attributes:
  check_mode:
    support: full
    description: Tells what would change.
  diff_mode:
    support: full
    description: Shows the targets before and after.
author:
  - agent-loop-service contributors
"""

EXAMPLES = r"""
- name: See what serves
  agentloop_route:
  register: route

- name: Give the candidate a tenth of the traffic
  agentloop_route:
    state: canary
    model_version: gemma-3-270m:20260101T020000Z
    weight: 10
    revision: "{{ route.route.revision }}"
"""

RETURN = r"""
route:
  description: The route now in force; in check mode the one that would be.
  returned: success
  type: dict
  sample: {alias: default, revision: 4, targets: [{model_version: "m:base", role: stable, weight: 100}]}
before:
  description: The route that was in force.
  returned: success
  type: dict
conflict:
  description: Whether it failed because somebody else changed the route.
  returned: failure
  type: bool
"""


class Target(TypedDict):
    """One model version of a route: role stable, canary or shadow; weight in whole percent."""

    model_version: str
    role: str
    weight: int


class RefusedError(Exception):
    """The change must not be made; the text says why and what to do."""


def targets_for(current: Sequence[Target], state: str, model_version: str, weight: int) -> list[Target]:
    """The targets that `state` asks for, made from the current ones.

    Raises:
        RefusedError: another canary is on trial, or the canary is the stable version itself.
    """
    shadows = [
        each for each in current if each["role"] == "shadow" and each["model_version"] != model_version
    ]
    if state == "stable":
        return [{"model_version": model_version, "role": "stable", "weight": 100}, *shadows]
    stable = next(each["model_version"] for each in current if each["role"] == "stable")
    other = next((each["model_version"] for each in current if each["role"] == "canary"), model_version)
    if other != model_version:
        raise RefusedError(
            f"{other} is a canary already: another rollout is at work, or one was killed. Wait for it, "
            "run it again, or put the route back with make rollback TO=" + stable
        )
    if stable == model_version:
        raise RefusedError(f"{model_version} is the stable version: it cannot be its own canary")
    return [
        {"model_version": stable, "role": "stable", "weight": 100 - weight},
        {"model_version": model_version, "role": "canary", "weight": weight},
        *shadows,
    ]


def same(one: Sequence[Target], other: Sequence[Target]) -> bool:
    """Whether these are the same targets, in any order."""

    def key(targets: Sequence[Target]) -> list[tuple[str, str, int]]:
        return sorted((each["model_version"], each["role"], int(each["weight"])) for each in targets)

    return key(one) == key(other)


def may_restore(route: dict[str, Any], model_version: str, revision: int) -> bool:
    """Whether the route is as this rollout left it, as far as a lost answer lets it know."""
    if route["revision"] == revision:
        return True
    leads = any(
        each["model_version"] == model_version and each["role"] != "shadow" for each in route["targets"]
    )
    return leads and route["revision"] == revision + 1


def wanted(route: dict[str, Any], asked: dict[str, Any]) -> list[Target]:
    """The targets that the module's options ask for, given the route in force.

    Raises:
        RefusedError: the route moved on, or the change makes no sense; nothing was changed.
    """
    current: list[Target] = route["targets"]
    if asked["state"] == "read":
        return current
    if asked["state"] == "restored":
        targets: list[Target] = asked["targets"]
        if not same(current, targets) and not may_restore(route, asked["model_version"], asked["revision"]):
            raise RefusedError(_moved_on(route, asked["revision"]) + "; it is left as it is")
        return targets
    targets = targets_for(current, asked["state"], asked["model_version"], asked["weight"])
    if asked["revision"] and asked["revision"] != route["revision"] and not same(current, targets):
        raise RefusedError(_moved_on(route, asked["revision"]))
    return targets


def _moved_on(route: dict[str, Any], revision: int) -> str:
    leads = ", ".join(
        f"{each['model_version']} {each['role']} {each['weight']} %" for each in route["targets"]
    )
    return (
        f"Somebody else changed the route {route['alias']}: it was at revision {revision} and is at "
        f"{route['revision']} ({leads})"
    )


def main() -> None:
    """Runs the module."""
    kinds = {"model_version": "str", "role": "str", "weight": "int"}
    target = {name: {"type": kind, "required": True} for name, kind in kinds.items()}
    module = AnsibleModule(
        argument_spec={
            "alias": {"type": "str", "default": "default"},
            "state": {"type": "str", "default": "read", "choices": ["read", "canary", "stable", "restored"]},
            "model_version": {"type": "str"},
            "weight": {"type": "int", "default": 10},
            "targets": {"type": "list", "elements": "dict", "options": target},
            "revision": {"type": "int", "default": 0},
            **CONNECTION,
        },
        required_if=[
            ("state", "canary", ["model_version"]),
            ("state", "stable", ["model_version"]),
            ("state", "restored", ["model_version", "targets"]),
        ],
        supports_check_mode=True,
    )
    asked = module.params
    if not 1 <= asked["weight"] <= 99:
        module.fail_json(msg=f"weight is {asked['weight']}; it must be from 1 to 99", conflict=False)
    alias = f"--alias={asked['alias']}"
    try:
        before = agent_loop(module, "route", "get", alias)
        targets = wanted(before, asked)
        diff = {"before": {"targets": before["targets"]}, "after": {"targets": targets}}
        if same(before["targets"], targets):
            module.exit_json(changed=False, route=before, before=before, diff=diff)
        if module.check_mode:
            module.exit_json(changed=True, route={**before, "targets": targets}, before=before, diff=diff)
        texts = [f"--target={each['model_version']}={each['role']}:{each['weight']}" for each in targets]
        after = agent_loop(module, "route", "set", alias, f"--revision={before['revision']}", *texts)
    except RefusedError as error:
        module.fail_json(msg=str(error), conflict=True)
    except CommandFailedError as error:
        conflict = error.code == CONFLICT
        said = (
            "Somebody else changed the route in the same moment: " if conflict else "The route could not be "
        )
        verb = "" if conflict else ("read: " if asked["state"] == "read" else "changed: ")
        module.fail_json(msg=f"{said}{verb}{error}", conflict=conflict, exit_code=error.code)
    route = {name: after[name] for name in ("alias", "revision", "targets")}
    module.exit_json(changed=after["changed"], route=route, before=before, diff=diff)


if __name__ == "__main__":
    main()
