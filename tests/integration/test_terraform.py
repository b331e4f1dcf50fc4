"""The modules of infra/terraform, checked by Terraform itself, with mocks of AWS."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.live_server import ROOT

SCRIPT = ROOT / "scripts" / "terraform.sh"
MODULES = sorted(path for path in (ROOT / "infra" / "terraform" / "modules").iterdir() if path.is_dir())


def test_without_the_provider_it_is_told_in_one_line_that_nothing_was_tested() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TF_PLUGIN_DIR"}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)
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


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_every_module_is_valid_and_its_tests_pass() -> None:
    if "TF_PLUGIN_DIR" not in os.environ or shutil.which("terraform") is None:
        pytest.skip("no folder with the AWS provider (TF_PLUGIN_DIR), which no package registry has")
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("The configuration is valid") == len(MODULES)
    assert " 0 passed" not in done.stdout
