"""The leaderboard's own AST checker, in a process of its own: what our scorer must agree with.

`bfcl_eval` is installed here without the 35 packages that it pins, which call vendors' APIs. Its checker is
plain Python but for one import, a table of all vendors' models, from which it asks one thing: whether a
model writes the dot of a function's name as an underscore. So the checker runs, as published, in a process
where that table has one entry: a model that does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training import bfcl

_PROGRAM = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
table = types.ModuleType("bfcl_eval.constants.model_config")
table.MODEL_CONFIG_MAPPING = {"ours": types.SimpleNamespace(underscore_to_dot=False)}
sys.modules[table.__name__] = table
from bfcl_eval.constants.enums import Language
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
for line in sys.stdin:
    functions, calls, accepted, category = json.loads(line)
    try:
        found = ast_checker(functions, calls, accepted, Language.PYTHON, category, "ours")["valid"]
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print(json.dumps(found), flush=False)
"""

Case = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]], str]
"""Published functions, calls as `{name: arguments}`, the published accepted calls, the category."""


class CheckerFailedError(RuntimeError):
    """The process ended badly; the text has the last of what it said."""


def check(cases: Iterable[Case]) -> list[bool | str]:
    """The checker's verdict on each case, in order; where it fails itself, its error as text.

    Raises:
        bfcl.DataNotInstalledError: if `bfcl_eval` is not installed.
        CheckerFailedError: if the checker cannot be run.
    """
    home = Path(bfcl.data_folder()).parents[1]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _PROGRAM, str(home)],
        input="".join(json.dumps(case) + "\n" for case in cases),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CheckerFailedError(f"the official checker ended with {done.returncode}: {done.stderr[-1500:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]
