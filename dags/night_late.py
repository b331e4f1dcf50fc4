"""What happens when a night is late: the callback of the deadline of both DAGs of `nightly_loop.py`.

It runs in the executor, as tasks do, and tells the Alertmanager that carries all other alerts of the service
to people (mail, chat, pager: its routes say where). Without `AGENTLOOP_ALERTMANAGER_URL` it only says so in
its log, and fails, so that Airflow shows that nobody was told.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

ALERT_HOURS = 12
"""Alertmanager takes an alert for resolved that is not sent again; this one stands for the morning."""
_TIMEOUT_SECONDS = 10

_log = logging.getLogger(__name__)


class NobodyToldError(RuntimeError):
    """The alert reached nobody; the text says why."""


def tell(context: Mapping[str, Any]) -> None:
    """Tell Alertmanager that the run of `context` is late; Airflow calls it once a run.

    Raises:
        NobodyToldError: if no Alertmanager is set, or it does not take the alert.
    """
    alert = alert_of(context["dag_run"])
    _log.error("%s", alert["annotations"]["summary"])
    address = os.environ.get("AGENTLOOP_ALERTMANAGER_URL", "").rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise NobodyToldError("AGENTLOOP_ALERTMANAGER_URL is not set to an http address, so nobody was told")
    request = Request(  # noqa: S310 - the scheme is looked at above
        f"{address}/api/v2/alerts", json.dumps([alert]).encode(), {"Content-Type": "application/json"}
    )
    try:
        urlopen(request, timeout=_TIMEOUT_SECONDS).close()  # noqa: S310
    except (URLError, OSError) as error:
        raise NobodyToldError(f"Alertmanager at {address} did not take the alert: {error}") from error


def alert_of(dag_run: Mapping[str, Any]) -> dict[str, Any]:
    """The alert of a late run, as Alertmanager's API v2 takes it; it holds names and times, no texts."""
    now = datetime.now(UTC)
    dag_id, run_id, state = (str(dag_run.get(name)) for name in ("dag_id", "dag_run_id", "state"))
    return {
        "labels": {
            "alertname": "AgentloopNightLate",
            "severity": "ticket",
            "dag_id": dag_id,
            "run_id": run_id,
        },
        "annotations": {
            "summary": f"The night {run_id} of {dag_id} is late: it is {state}, and should have ended.",
            "description": "Nothing that serves is broken: the champion goes on. Look at the run in Airflow:"
            " the red or running task's page says what to do.",
        },
        "startsAt": now.isoformat(),
        "endsAt": (now + timedelta(hours=ALERT_HOURS)).isoformat(),
    }
