#!/usr/bin/python
"""Ansible module: read what a cycle made, and write down how its rollout went."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.agentloop_metrics import FAILED, ended
from ansible.module_utils.agentloop_sources import servers
from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: rollout_record
short_description: Read what a cycle made, and write down how its rollout went
description:
  - Keeps C(rollout.partial.json) in the cycle directory while a rollout is at work, so that one that was
    killed knows what to put back, and turns it into C(rollout.json) at its end. Both appear by atomic rename.
  - Writing down is not a change of the system, so I(changed) is always false.
version_added: "0.1.0"
options:
  cycle_dir:
    description: The cycle directory.
    type: path
    required: true
  action:
    description:
      - C(read) reads the gate's verdict, the candidate and how far a rollout has come.
      - C(start) begins the record, or goes on with the one that a killed rollout left.
      - C(step) adds a step.
      - C(finish) ends the record.
    type: str
    choices: [read, start, step, finish]
    default: read
  route:
    description: The route before (C(start)) or after (C(finish)).
    type: dict
  candidate:
    description: The candidate's model version. Required for C(start).
    type: str
  alias:
    description: The alias whose requests are counted between start and finish.
    type: str
    default: default
  metrics_url:
    description: Where each server's own metrics are. Unreachable, the counts of requests are null.
    type: list
    elements: str
    default: []
  ca_file:
    description: PEM, the authority of these addresses' certificates, if not one of the host's.
    type: path
  step:
    description: Name of the step.
    type: str
  decision:
    description: What was decided at the step.
    type: str
    default: ""
  reason:
    description: Why.
    type: str
    default: ""
  metrics:
    description: The figures that were decided on.
    type: dict
    default: {}
  result:
    description: How the rollout ended; C(promoted), C(rolled_back) or C(not_started).
    type: str
    choices: [promoted, rolled_back, not_started]
attributes:
  check_mode:
    support: full
    description: Writes nothing.
author:
  - agent-loop-service contributors
"""

EXAMPLES = r"""
- name: Read what the cycle made
  rollout_record:
    cycle_dir: /srv/cycles/20260101T020000Z
  register: cycle

- name: Write down that the canary began
  rollout_record:
    cycle_dir: /srv/cycles/20260101T020000Z
    action: step
    step: canary
    decision: go on
"""

RETURN = r"""
verdict:
  description: What the gate said, and why.
  returned: action is read
  type: dict
  sample: {verdict: pass, reason: better by 0.1}
candidate:
  description: The candidate's C(model_version), C(sha256) and the C(path) of its GGUF.
  returned: action is read
  type: dict
result:
  description: The result of a rollout that has ended; empty if none has.
  returned: action is read
  type: str
record:
  description: The record as it is now.
  returned: always
  type: dict
"""


class UnfitError(Exception):
    """The cycle directory cannot be rolled out; the text says what is missing."""


def load(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None if there is no such file.

    Raises:
        UnfitError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UnfitError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UnfitError(f"{path} holds no JSON object")
    return value


def save(path: Path, value: dict[str, Any]) -> None:
    """Replaces `path` in one step: a reader sees the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def serves(targets: list[dict[str, Any]], model_version: str) -> bool:
    """Whether `model_version` answers callers on this route."""
    return any(each["model_version"] == model_version and each["role"] != "shadow" for each in targets)


def without(targets: list[dict[str, Any]], canary: str) -> list[dict[str, Any]]:
    """The targets as they were before `canary` took its share from the stable version."""
    if not any(each["model_version"] == canary and each["role"] == "canary" for each in targets):
        return targets
    left = [each for each in targets if each["role"] != "canary"]
    return [{**each, "weight": 100} if each["role"] == "stable" else each for each in left]


class Record:
    """How one cycle's rollout went, in its directory."""

    def __init__(self, cycle_dir: Path) -> None:
        self._dir = cycle_dir
        self._partial = cycle_dir / "rollout.partial.json"
        self._final = cycle_dir / "rollout.json"

    def cycle(self) -> dict[str, Any]:
        """Verdict, candidate, result so far and record.

        Raises:
            UnfitError: there is no verdict or no candidate.
        """
        gate = load(self._dir / "gate.json")
        if gate is None:
            raise UnfitError(
                f"{self._dir} has no gate.json: run `python -m training gate --cycle` on it first"
            )
        model = self._dir / "model.gguf"
        candidate = gate.get("candidate")
        if not isinstance(candidate, dict) or not {"model_version", "sha256"} <= candidate.keys():
            raise UnfitError(f"{self._dir / 'gate.json'} names no candidate with model_version and sha256")
        if not model.is_file():
            raise UnfitError(f"{model} is missing: run `python -m training quantize --cycle` on it again")
        final, partial = load(self._final), load(self._partial)
        return {
            "verdict": {"verdict": gate.get("verdict", ""), "reason": gate.get("reason", "")},
            "candidate": {**candidate, "path": str(model.resolve())},
            "result": "" if final is None else final.get("result", ""),
            "record": final or partial or {},
        }

    def start(
        self, route: dict[str, Any], candidate: str, counts: dict[str, int] | None, now: datetime
    ) -> dict[str, Any]:
        """Begins; what a killed rollout left keeps its start, and its route before if that still matters."""
        record = load(self._partial)
        if record is None or self._final.exists():
            earlier = load(self._final) or {}
            record = {"started_at": _iso(now), "steps": earlier.get("steps", []), "counts_before": counts}
        else:
            record["steps"].append(
                _step(now, "resumed", "go on", "an earlier run of this rollout was killed", {})
            )
        if "route_before" not in record or not serves(route["targets"], candidate):
            record["route_before"] = without(route["targets"], candidate)
        save(self._partial, record)
        self._final.unlink(missing_ok=True)
        return record

    def step(
        self, now: datetime, step: str, decision: str, reason: str, metrics: dict[str, Any]
    ) -> dict[str, Any]:
        """Adds a step to the record at work."""
        record = load(self._partial) or {"started_at": _iso(now), "steps": []}
        record["steps"].append(_step(now, step, decision, reason, metrics))
        save(self._partial, record)
        return record

    def finish(
        self,
        now: datetime,
        result: str,
        reason: str,
        route: dict[str, Any] | None,
        counts: dict[str, int] | None,
    ) -> dict[str, Any]:
        """Ends the record at work, or amends the one that had ended (a rollback later on)."""
        record = load(self._partial) or load(self._final) or {"started_at": _iso(now), "steps": []}
        before = record.pop("counts_before", None)
        started = datetime.fromisoformat(record["started_at"])
        record.setdefault("route_before", [])
        record.setdefault("seconds", round((now - started).total_seconds(), 1))
        record.setdefault("requests", _grown(before, counts, "requests"))
        record.setdefault("failed_requests", _grown(before, counts, "failed"))
        record["steps"].append(_step(now, "end", result, reason, {}))
        record |= {"result": result, "reason": reason}
        record["route_after"] = (
            route["targets"] if route else record.get("route_after", record["route_before"])
        )
        save(self._final, record)
        self._partial.unlink(missing_ok=True)
        return record


def _iso(now: datetime) -> str:
    return now.isoformat(timespec="milliseconds")


def _step(now: datetime, step: str, decision: str, reason: str, metrics: dict[str, Any]) -> dict[str, Any]:
    return {"at": _iso(now), "step": step, "decision": decision, "reason": reason, "metrics": metrics}


def _grown(before: dict[str, int] | None, after: dict[str, int] | None, name: str) -> int | None:
    """How much a count grew; from 0 if its server began anew; None if it is not known."""
    if before is None or after is None:
        return None
    return after[name] - before[name] if after["requests"] >= before["requests"] else after[name]


def count(metrics_url: list[str], alias: str, ca_file: str | None = None) -> dict[str, int] | None:
    """Inferences of `alias` that ended, and failed, since servers began; None if one does not answer."""
    if not metrics_url:
        return None
    with suppress(OSError, ValueError):
        samples = servers(metrics_url, ca_file)()
        return {"requests": ended(samples, alias), "failed": ended(samples, alias, FAILED)}
    return None


def main() -> None:
    """Runs the module."""
    module = AnsibleModule(
        argument_spec={
            "cycle_dir": {"type": "path", "required": True},
            "action": {"type": "str", "default": "read", "choices": ["read", "start", "step", "finish"]},
            "route": {"type": "dict"},
            "candidate": {"type": "str"},
            "alias": {"type": "str", "default": "default"},
            "metrics_url": {"type": "list", "elements": "str", "default": []},
            "ca_file": {"type": "path"},
            "step": {"type": "str"},
            "decision": {"type": "str", "default": ""},
            "reason": {"type": "str", "default": ""},
            "metrics": {"type": "dict", "default": {}},
            "result": {"type": "str", "choices": ["promoted", "rolled_back", "not_started"]},
        },
        required_if=[
            ("action", "start", ["route", "candidate"]),
            ("action", "step", ["step"]),
            ("action", "finish", ["result"]),
        ],
        supports_check_mode=True,
    )
    asked = module.params
    record, now = Record(Path(asked["cycle_dir"])), datetime.now(UTC)
    try:
        if asked["action"] == "read":
            module.exit_json(changed=False, **record.cycle())
        if module.check_mode:
            known = {}
            if asked["action"] == "start":
                known["route_before"] = without(asked["route"]["targets"], asked["candidate"])
            module.exit_json(changed=False, record=known)
        if asked["action"] == "step":
            written = record.step(now, *(asked[name] for name in ("step", "decision", "reason", "metrics")))
        else:
            counts = count(asked["metrics_url"], asked["alias"], asked["ca_file"])
            if asked["action"] == "start":
                written = record.start(asked["route"], asked["candidate"], counts, now)
            else:
                written = record.finish(now, asked["result"], asked["reason"], asked["route"], counts)
    except (UnfitError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, record=written)


if __name__ == "__main__":
    main()
