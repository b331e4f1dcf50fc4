"""In place of the DAG's run, which the end-to-end test has: writes a cycle, as asked by its argument.

night_stand_in.py VERDICT     a cycle with that verdict, made from the live server's own champion
night_stand_in.py fail        ends with exit code 3 in the midst of it
night_stand_in.py skip        ends well at curation, as when there is too little to learn
night_stand_in.py kill        kills the server

Of a cycle with `--cycle ID`; what an earlier run left of that is made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from agentloop import Client
from tests.integration import night_by_hand
from training import cycle


def main(how: str, cycle_id: str = "") -> int:
    cycle_id = cycle_id or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    cycle_dir = Path(os.environ["AGENTLOOP_CYCLES_DIR"]) / cycle_id
    shutil.rmtree(cycle_dir, ignore_errors=True)

    def change(name: str, **other: Any) -> None:
        cycle.write_json(cycle_dir / name, cycle.read_json(cycle_dir / name) | other)

    with Client() as client:  # AGENTLOOP_SERVER and AGENTLOOP_TOKEN_FILE
        champion = client.get_route().stable
    with urlopen(os.environ["AGENTLOOP_METRICS_URL"], timeout=10) as metrics:
        assert b"agentloop_inferences_total" in metrics.read()
    if how == "kill":
        server = json.loads((Path(os.environ["AGENTLOOP_STATE_DIR"]) / "server.json").read_text())
        os.kill(server["pid"], signal.SIGKILL)
        time.sleep(600)
    until = {"fail": "validate", "skip": "curate"}.get(how, "gate")
    with tempfile.TemporaryDirectory(dir=cycle_dir.parents[1]) as elsewhere:  # its id is of another night
        cycle_dir.parent.mkdir(exist_ok=True)
        verdict = how if until == "gate" else "pass"
        night_by_hand.make(Path(elsewhere), until=until, verdict=verdict).rename(cycle_dir)
    print("curating", flush=True)
    if how == "fail":
        print("no space left on device", file=sys.stderr)
        return 3
    if how == "skip":
        few = "3 new training examples, 32 needed"
        change("dataset/dataset.json", enough=False, reason=few, new_train=3, new_gate=1)
        return 0
    change("dataset/dataset.json", new_train=20, new_gate=4)
    subject = {"n": 100, "correct": 10, "accuracy": 0.1, "ci_low": 0.05, "ci_high": 0.2, "length_share": 0.0}
    change("evaluation/summary.json", simple_python={"champion": subject, "candidate": subject})
    change("gate.json", champion={"model_version": champion, "sha256": "b" * 64})
    print(cycle_dir, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*(each for each in sys.argv[1:] if each != "--cycle")))
