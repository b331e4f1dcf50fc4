"""In place of the DAG's run, which the end-to-end test has: writes a cycle, as asked by its argument.

night_stand_in.py VERDICT     a cycle with that verdict, made from the live server's own champion
night_stand_in.py fail        ends with exit code 3 in the midst of it
night_stand_in.py skip        ends well before any verdict, as when there is nothing to learn
night_stand_in.py kill        kills the server
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from agentloop import Client


def main(how: str) -> int:
    cycle_dir = Path(os.environ["AGENTLOOP_CYCLES_DIR"]) / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"

    def put(name: str, value: Any) -> None:
        (cycle_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (cycle_dir / name).write_text(json.dumps(value))

    with Client() as client:  # AGENTLOOP_SERVER and AGENTLOOP_TOKEN_FILE
        champion = client.get_route().stable
    with urlopen(os.environ["AGENTLOOP_METRICS_URL"], timeout=10) as metrics:
        assert b"agentloop_inferences_total" in metrics.read()
    if how == "kill":
        server = json.loads((Path(os.environ["AGENTLOOP_STATE_DIR"]) / "server.json").read_text())
        os.kill(server["pid"], signal.SIGKILL)
        time.sleep(600)
    put("snapshot/snapshot.json", {})
    put("validation/result.json", {"quarantined_rows": 0})
    print("curating", flush=True)
    if how == "fail":
        print("no space left on device", file=sys.stderr)
        return 3
    if how == "skip":
        return 0
    put("dataset/dataset.json", {"new_train": 20, "new_gate": 4, "excluded": {"no_demonstration": 7}})
    subject = {"accuracy": 0.1, "ci_low": 0.05, "ci_high": 0.2}
    put("evaluation/summary.json", {"simple_python": {"champion": subject, "candidate": subject}})
    put(
        "gate.json",
        {"verdict": how, "reason": "10 of 100 against 10", "champion": {"model_version": champion}},
    )
    put("manifest.json", {})
    print(cycle_dir, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
