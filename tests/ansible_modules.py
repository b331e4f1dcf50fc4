"""Loads this project's Ansible modules as Ansible does, so that tests import them; encrypts as its vault."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ansible.module_utils._internal._patches._sys_intern_patch import SysInternPatch
from ansible.parsing.vault import VaultLib, VaultSecret

ROOT = Path(__file__).resolve().parents[1] / "infra" / "ansible"


def encrypted(content: bytes, password: bytes) -> bytes:
    """As `ansible-vault encrypt` makes it."""
    made: bytes = VaultLib([("default", VaultSecret(password))]).encrypt(content)
    return made


def _load(name: str, path: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


metrics = _load("ansible.module_utils.agentloop_metrics", ROOT / "module_utils" / "agentloop_metrics.py")
sources = _load("ansible.module_utils.agentloop_sources", ROOT / "module_utils" / "agentloop_sources.py")
judgement = _load(
    "ansible.module_utils.agentloop_judgement", ROOT / "module_utils" / "agentloop_judgement.py"
)
cli = _load("ansible.module_utils.agentloop_cli", ROOT / "module_utils" / "agentloop_cli.py")
canary_analysis = _load("canary_analysis", ROOT / "library" / "canary_analysis.py")
agentloop_route = _load("agentloop_route", ROOT / "library" / "agentloop_route.py")
agentloop_model = _load("agentloop_model", ROOT / "library" / "agentloop_model.py")
agentloop_gateway = _load("agentloop_gateway", ROOT / "library" / "agentloop_gateway.py")
certificate_check = _load("certificate_check", ROOT / "library" / "certificate_check.py")
agentloop_lock = _load("agentloop_lock", ROOT / "library" / "agentloop_lock.py")
agentloop_lock_action = _load("agentloop_lock_action", ROOT / "plugins" / "action" / "agentloop_lock.py")
server_probe = _load("server_probe", ROOT / "library" / "server_probe.py")
server_watch = _load("server_watch", ROOT / "library" / "server_watch.py")
rollout_record = _load("rollout_record", ROOT / "library" / "rollout_record.py")

# Ansible replaces `sys.intern` by an object of its own in the process that imports it. torch's compiler,
# which other tests import into this one, refuses anything but the function.
if isinstance(sys.intern, SysInternPatch):
    sys.intern = SysInternPatch.unpatched_implementation
