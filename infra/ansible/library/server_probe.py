#!/usr/bin/python
"""Ansible module: whether a server that nobody uses yet answers as well as the one that serves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: server_probe
short_description: Ask a server real requests, and compare it with another
description:
  - Asks I(server) each of I(prompts), and I(against), if it is given, the same in turn, so that both are
    measured in the same minute. Nothing is changed.
  - Fails if I(server) leaves a request unanswered, or answers more slowly than I(against) by more than
    I(latency_factor) and I(latency_slack) allow. What I(against) leaves unanswered is told, and no failure.
  - Runs with the Python of an installed release, whose client it uses (C(ansible_python_interpreter)).
version_added: "0.1.0"
options:
  server:
    description: The server's address, C(grpcs://host:port).
    type: str
    required: true
  against:
    description: The address of the server that serves now; empty for none.
    type: str
    default: ""
  token_file:
    description: A file with a token of the scope C(infer).
    type: path
    required: true
  ca_file:
    description: PEM, the authority of the servers' certificates.
    type: path
  alias:
    description: The alias that is asked.
    type: str
    default: default
  prompts:
    description: What is asked.
    type: list
    elements: str
    default: [Say hello., Name a colour., Count to three.]
  warm_up:
    description: Requests before those that are measured.
    type: int
    default: 1
  max_tokens:
    description: Of each answer.
    type: int
    default: 8
  timeout:
    description: Seconds that an answer may take.
    type: float
    default: 120
  latency_factor:
    description: The median may be so many times that of I(against).
    type: float
    default: 2.0
  latency_slack:
    description: And so many seconds more.
    type: float
    default: 2.0
attributes:
  check_mode:
    support: full
    description: Asks nothing in check mode.
author:
  - agent-loop-service contributors
"""

EXAMPLES = r"""
- name: Ask the idle colour what the other answers
  server_probe:
    server: grpcs://app1:50052
    against: grpcs://app1:50051
    token_file: /etc/agentloop/probe.token
    ca_file: /etc/agentloop/tls/ca.crt
  vars:
    ansible_python_interpreter: /opt/agentloop/green/bin/python
"""

RETURN = r"""
server:
  description: What I(server) did.
  returned: always
  type: dict
  sample: {answered: 3, failed: [], median_seconds: 0.4, model_versions: ["m:base"]}
against:
  description: What I(against) did in the same minute.
  returned: always
  type: dict
"""

Ask = Callable[[str], str]
"""Answers a prompt; returns the model version that answered."""


@dataclass
class Probed:
    """What one server did."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    model_versions: set[str] = field(default_factory=set)

    @property
    def median(self) -> float | None:
        """Of the answers' seconds; None if there were none."""
        return statistics.median(self.seconds) if self.seconds else None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "answered": len(self.seconds),
            "failed": self.failed,
            "median_seconds": None if self.median is None else round(self.median, 3),
            "model_versions": sorted(self.model_versions),
        }


def probe(
    asks: Sequence[Ask], prompts: Sequence[str], warm_up: int, clock: Callable[[], float] = time.monotonic
) -> list[Probed]:
    """Ask all servers the same in turn. Errors are counted by what they say, which quotes no prompt."""
    probed = [Probed() for _ in asks]
    for place, prompt in enumerate([*[prompts[0]] * warm_up, *prompts]):
        for ask, figures in zip(asks, probed, strict=True):
            began = clock()
            try:
                figures.model_versions.add(ask(prompt))
            except Exception as error:  # whatever it is, the server did not answer
                figures.failed.append(f"{type(error).__name__}: {error}")
            else:
                if place >= warm_up:
                    figures.seconds.append(clock() - began)
    return probed


def verdict(new: Probed, old: Probed | None, factor: float, slack: float) -> str:
    """Why the new server must not serve; empty if it may."""
    if new.failed:
        return f"it left {len(new.failed)} requests unanswered; the first: {new.failed[0]}"
    if old is None or old.median is None or new.median is None:
        return ""
    limit = factor * old.median + slack
    if new.median <= limit:
        return ""
    return (
        f"its median is {new.median:.2f} s; with the serving colour's {old.median:.2f} s it may be"
        f" {limit:.2f} s"
    )


def asking(server: str, options: dict[str, Any]) -> Ask:
    """A server's answers through its release's own client."""
    from agentloop.sync_client import Client
    from agentloop.types import Sampling

    client = Client(server, token_file=options["token_file"], ca_file=options["ca_file"])
    sampling = Sampling(max_tokens=options["max_tokens"], temperature=0.0)

    def ask(prompt: str) -> str:
        answer = client.ask(prompt, alias=options["alias"], sampling=sampling, timeout_s=options["timeout"])
        return answer.model_version

    return ask


def main() -> None:
    """Runs the module."""
    module = AnsibleModule(
        argument_spec={
            "server": {"type": "str", "required": True},
            "against": {"type": "str", "default": ""},
            "token_file": {"type": "path", "required": True, "no_log": False},
            "ca_file": {"type": "path"},
            "alias": {"type": "str", "default": "default"},
            "prompts": {
                "type": "list",
                "elements": "str",
                "default": ["Say hello.", "Name a colour.", "Count to three."],
            },
            "warm_up": {"type": "int", "default": 1},
            "max_tokens": {"type": "int", "default": 8, "no_log": False},
            "timeout": {"type": "float", "default": 120.0},
            "latency_factor": {"type": "float", "default": 2.0},
            "latency_slack": {"type": "float", "default": 2.0},
        },
        supports_check_mode=True,
    )
    asked = module.params
    if not asked["prompts"]:
        module.fail_json(msg="prompts is empty; name at least one")
    if module.check_mode:
        module.exit_json(changed=False, server=Probed().plain(), against=Probed().plain())
    servers = [asked["server"], *([asked["against"]] if asked["against"] else [])]
    try:
        probed = probe([asking(server, asked) for server in servers], asked["prompts"], asked["warm_up"])
    except ImportError as error:
        module.fail_json(msg=f"{error}: run this module with the Python of an installed release")
    except ValueError as error:  # the client's word on an address, a token or a file
        module.fail_json(msg=str(error))
    new, old = probed[0], (probed[1] if len(probed) > 1 else None)
    why = verdict(new, old, asked["latency_factor"], asked["latency_slack"])
    report = {"server": new.plain(), "against": (old or Probed()).plain()}
    if why:
        module.fail_json(msg=f"{asked['server']} must not serve: {why}", **report)
    module.exit_json(changed=False, **report)


if __name__ == "__main__":
    main()
