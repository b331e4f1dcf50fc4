#!/usr/bin/python
"""Ansible module: whether a server that has just begun to serve keeps answering its callers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ansible.module_utils.agentloop_metrics import FAILED, Increase, Series, ended, fetch
from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: server_watch
short_description: Watch the requests of a server for a while
description:
  - Reads a server's Prometheus metrics again and again, and fails as soon as more of its requests failed than
    I(error_share) allows, or it does not answer twice in a row. Nothing is changed.
  - Without any request it passes when the time is over.
version_added: "0.1.0"
options:
  metrics_url:
    description: The server's metrics.
    type: str
    required: true
  ca_file:
    description: PEM, the authority of the server's certificate.
    type: path
  seconds:
    description: How long to watch.
    type: float
    default: 30
  poll_interval:
    description: Seconds between two looks.
    type: float
    default: 1
  error_share:
    description: The share of the requests that may fail, 0 to 1.
    type: float
    default: 0.02
attributes:
  check_mode:
    support: full
    description: Watches nothing in check mode.
author:
  - agent-loop-service contributors
"""

EXAMPLES = r"""
- name: Watch the colour that serves now
  server_watch:
    metrics_url: https://app1:8081/metrics
    ca_file: /etc/agentloop/tls/ca.crt
    seconds: 60
"""

RETURN = r"""
requests:
  description: Requests that ended while it watched, but for those that their callers cancelled.
  returned: always
  type: int
failed:
  description: How many of them failed.
  returned: always
  type: int
"""

Scrape = Callable[[], dict[Series, float]]
LOST = 2
"""So many looks in a row without an answer mean that it is down."""


def counted(total: dict[Series, float]) -> tuple[int, int]:
    """Requests that ended, and those of them that failed, over all aliases."""
    aliases = {
        dict(labels).get("alias", "") for name, labels in total if name == "agentloop_inferences_total"
    }
    failed = sum(ended(total, alias, FAILED) for alias in aliases)
    return sum(ended(total, alias, {"ok"}) for alias in aliases) + failed, failed


def watch(
    scrape: Scrape,
    seconds: float,
    poll: float,
    error_share: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[int, int, str]:
    """Requests, how many of them failed, and why it must not go on serving (empty if it may)."""
    increase, lost, end = Increase(), 0, clock() + seconds
    while True:
        try:
            increase.add(scrape())
            lost = 0
        except (OSError, ValueError) as error:
            lost += 1
            if lost >= LOST:
                return *counted(increase.total), f"it does not answer: {error}"
        requests, failed = counted(increase.total)
        if failed > error_share * requests:
            return requests, failed, f"{failed} of {requests} requests failed"
        if clock() >= end:
            return requests, failed, ""
        sleep(poll)


def main() -> None:
    """Runs the module."""
    module = AnsibleModule(
        argument_spec={
            "metrics_url": {"type": "str", "required": True},
            "ca_file": {"type": "path"},
            "seconds": {"type": "float", "default": 30.0},
            "poll_interval": {"type": "float", "default": 1.0},
            "error_share": {"type": "float", "default": 0.02},
        },
        supports_check_mode=True,
    )
    asked: dict[str, Any] = module.params
    if module.check_mode:
        module.exit_json(changed=False, requests=0, failed=0)
    requests, failed, why = watch(
        lambda: fetch(asked["metrics_url"], ca_file=asked["ca_file"]),
        asked["seconds"],
        asked["poll_interval"],
        asked["error_share"],
    )
    if why:
        module.fail_json(
            msg=f"{asked['metrics_url']} must not go on serving: {why}", requests=requests, failed=failed
        )
    module.exit_json(changed=False, requests=requests, failed=failed)


if __name__ == "__main__":
    main()
