#!/usr/bin/env python3
"""Drains this EC2 instance before AWS takes it: its streams end, its spool is stored or saved.

Asked every few seconds is the instance metadata service (IMDSv2): whether the autoscaling group wants the
host ended (`autoscaling/target-lifecycle-state` is `Terminated`:
https://docs.aws.amazon.com/autoscaling/ec2/userguide/retrieving-target-lifecycle-state-through-imds.html),
or whether spare capacity is taken back in two minutes (`spot/instance-action`). Stopping the service is
what drains: it tells gateways that it does not serve, ends its streams, and flushes its spool. What the
database did not take by then is packed to the bucket, so that no accepted record goes with the disk.

Standard library only, and the `aws` command. It ends when the host has been drained.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

IMDS = "http://169.254.169.254"
SECONDS = 5.0
TRY_AGAIN_SECONDS = 15.0
DRAINED = "Terminated"


class Metadata:
    """What AWS tells this instance about itself."""

    def __init__(self, url: str = IMDS) -> None:
        self._url = url.rstrip("/") + "/latest"
        # Never through a proxy: the answer is this machine's.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> str | None:
        """The text at `path`, or None where there is none. Raises OSError if nobody answers."""
        asked = urllib.request.Request(  # noqa: S310 - http, to a fixed address
            f"{self._url}/api/token",
            method="PUT",
            headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"},
        )
        with self._opener.open(asked, timeout=SECONDS) as answer:
            token = answer.read().decode()
        asked = urllib.request.Request(  # noqa: S310
            f"{self._url}/meta-data/{path}", headers={"X-aws-ec2-metadata-token": token}
        )
        try:
            with self._opener.open(asked, timeout=SECONDS) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise


def ending(metadata: Metadata) -> str:
    """Why the host is to go ("scale-in", "spot"), or "" while it is not, or nobody can tell."""
    try:
        if metadata.get("autoscaling/target-lifecycle-state") == DRAINED:
            return "scale-in"
        if metadata.get("spot/instance-action") is not None:
            return "spot"
    except OSError as error:
        print(f"the metadata service does not answer: {error}", file=sys.stderr, flush=True)
    return ""


def left(spool: Path) -> bool:
    """Whether a stopped server's spool holds something that is not stored: records or dead letters.

    Its segments are named by the position of their first byte, and end in zeros where they are not
    written yet; `position` says up to where all is stored. What cannot be read counts as left.
    """
    if any((spool / "dead").glob("*.json")):
        return True
    try:
        stored = int((spool / "position").read_text(encoding="ascii").split()[0])
    except FileNotFoundError:
        stored = 0
    except (OSError, ValueError, IndexError):
        return True
    return any(
        segment.read_bytes()[max(0, stored - int(segment.stem)) :].rstrip(b"\0")
        for segment in spool.glob("[0-9]*.log")
    )


def save(state: Path, target: str, run: Callable[[Sequence[str]], None]) -> list[Path]:
    """Pack spools in which something is left to `target` in the bucket; returns them. Raises OSError."""
    spools = sorted(spool for spool in state.glob("*/spool") if left(spool))
    if spools:
        with tempfile.TemporaryDirectory(prefix="agentloop-spools-") as folder:
            packed = f"{folder}/spools.tar.gz"
            names = [str(spool.relative_to(state)) for spool in spools]
            run(["tar", "--create", "--gzip", "--file", packed, f"--directory={state}", *names])
            run(["aws", "s3", "cp", "--only-show-errors", packed, target])
    return spools


def drain(
    arguments: argparse.Namespace,
    instance: str,
    run: Callable[[Sequence[str]], None],
    sleep: Callable[[float], None],
) -> None:
    """Stop the service, save what is left, and tell AWS; what fails is tried again and again."""
    told = [
        *("aws", "autoscaling", "complete-lifecycle-action", "--lifecycle-action-result", "CONTINUE"),
        *("--instance-id", instance, "--lifecycle-hook-name", arguments.hook),
        *("--auto-scaling-group-name", arguments.group, "--region", arguments.region),
    ]
    target = f"s3://{arguments.bucket}/backups/spools/{instance}.tar.gz"
    steps: list[tuple[str, Callable[[], object]]] = [
        ("stopped", lambda: run(["systemctl", "stop", *arguments.units])),
        ("saved what was not stored", lambda: save(Path(arguments.state), target, run)),
        ("told the autoscaling group", lambda: run(told)),
    ]
    for what, step in steps:
        while True:
            try:
                step()
                print(what, flush=True)
                break
            except OSError as error:
                again = f"tried again in {TRY_AGAIN_SECONDS:.0f} s"
                print(f"not {what}, {again}: {error}", file=sys.stderr, flush=True)
                sleep(TRY_AGAIN_SECONDS)


def command(arguments: Sequence[str]) -> None:
    """Run a program. Raises OSError with what it said if it fails."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(arguments[:3])} failed ({done.returncode}): {done.stderr.strip()[-500:]}")


def main(given: Sequence[str] | None = None, metadata: Metadata | None = None) -> int:
    """Wait for the end, drain, and return 0."""
    parser = argparse.ArgumentParser(description="Drains this EC2 instance before AWS takes it.")
    parser.add_argument("--region", required=True)
    parser.add_argument("--bucket", required=True, help="takes spools that the database did not take")
    parser.add_argument("--group", required=True, help="the autoscaling group")
    parser.add_argument("--hook", required=True, help="its lifecycle hook")
    parser.add_argument("--look-seconds", type=float, default=5.0)
    parser.add_argument("--state", default="/var/lib/agentloop", help="has <colour>/spool")
    parser.add_argument("units", nargs="+", help="what systemd stops")
    arguments = parser.parse_args(given)
    metadata = metadata or Metadata()
    while not (why := ending(metadata)):
        time.sleep(arguments.look_seconds)
    print(f"AWS takes this host ({why}): draining", flush=True)
    drain(arguments, metadata.get("instance-id") or "", command, time.sleep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
