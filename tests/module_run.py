"""Runs an Ansible module's `main` in this process, with options as Ansible passes them."""

from __future__ import annotations

import contextlib
import io
import json
from types import ModuleType
from typing import Any

from ansible.module_utils.testing import patch_module_args


def run_module(module: ModuleType, options: dict[str, Any], *, check: bool = False) -> dict[str, Any]:
    """What the module reports, as Ansible reads it."""
    out = io.StringIO()
    with (
        patch_module_args({**options, "_ansible_check_mode": check}),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        module.main()
    report: dict[str, Any] = json.loads(out.getvalue().strip().splitlines()[-1])
    return report
