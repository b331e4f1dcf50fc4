#!/usr/bin/python
"""Ansible module: have a model version installed."""

from __future__ import annotations

from ansible.module_utils.agentloop_cli import CONNECTION, CommandFailedError, agent_loop
from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
---
module: agentloop_model
short_description: Install a GGUF as a model version
description:
  - Has a model version installed on a server, through C(agent-loop models). A model version never changes, so
    one that is installed with the same sha256 is left alone, and one with another sha256 is an error.
version_added: "0.1.0"
options:
  name:
    description: The model version, C(<model>:<cycle id>).
    type: str
    required: true
  path:
    description: The GGUF on the server's host, as an absolute path.
    type: path
    required: true
  sha256:
    description: The file's expected SHA-256, in hex.
    type: str
    required: true
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
    description: Tells whether it would install.
author:
  - agent-loop-service contributors
"""

EXAMPLES = r"""
- name: Install the candidate
  agentloop_model:
    name: gemma-3-270m:20260101T020000Z
    path: /srv/cycles/20260101T020000Z/model.gguf
    sha256: "{{ gate.candidate.sha256 }}"
"""

RETURN = r"""
model:
  description: The model version as it is installed; in check mode only what would be.
  returned: success
  type: dict
  sample: {name: "gemma-3-270m:20260101T020000Z", sha256: ab12, size_bytes: 253000000, loaded: true}
"""


def main() -> None:
    """Runs the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "sha256": {"type": "str", "required": True},
            **CONNECTION,
        },
        supports_check_mode=True,
    )
    name, sha256 = module.params["name"], module.params["sha256"].lower()
    try:
        models = agent_loop(module, "models", "list")["models"]
        installed = next((model for model in models if model["name"] == name), None)
        if installed is not None and installed["sha256"] == sha256:
            module.exit_json(changed=False, model=installed)
        if module.check_mode:
            module.exit_json(changed=True, model={"name": name, "sha256": sha256})
        answer = agent_loop(module, "models", "install", name, module.params["path"], f"--sha256={sha256}")
        module.exit_json(changed=answer["changed"], model=answer["model"])
    except CommandFailedError as error:
        module.fail_json(msg=f"{name} could not be installed: {error}", exit_code=error.code)


if __name__ == "__main__":
    main()
