"""Alerts reach those who must act, by mail and web hook, and only once for one cause."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.integration.alertmanager_bench import CONFIG, alertmanager

ONCALL, OPERATIONS = "oncall@example.com", "operations@example.com"


def alert(name: str, severity: str, **labels: str) -> dict[str, str]:
    return {"alertname": name, "severity": severity, **labels}


def test_amtool_has_nothing_against_the_configuration() -> None:
    done = subprocess.run(
        ["amtool", "check-config", CONFIG], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


async def test_a_page_is_mailed_and_called_and_a_ticket_is_mailed(tmp_path: Path) -> None:
    async with alertmanager(tmp_path / "alerts") as manager:
        down = alert("AgentloopDown", "page", instance="a")
        refusing = alert("AgentloopRefusing", "ticket")
        # What follows from a server that is down, or from a fast burn, is told to nobody.
        old = alert("AgentloopSpoolOld", "ticket", instance="a")
        gone = alert("AgentloopGatewayDown", "page", instance="g")
        idle = alert("AgentloopHostIdle", "ticket", instance="g", host="a")
        fast = alert("AgentloopSloBurningFast", "page", slo="availability")
        slow = alert("AgentloopSloBurningSlowly", "ticket", slo="availability")
        await manager.fire(down, fast, gone, old, slow, idle, refusing, alert("Unforeseen", "who knows"))
        await manager.until_mailed(ONCALL, "AgentloopDown")
        await manager.until_mailed(ONCALL, "AgentloopSloBurningFast")
        await manager.until_mailed(ONCALL, "AgentloopGatewayDown")
        await manager.until_mailed(OPERATIONS, "AgentloopRefusing")
        await manager.until_mailed(OPERATIONS, "Unforeseen")
        everything = " ".join(subject + text for _, subject, text in manager.mails)
        await manager.fire(down, ended="2026-01-01T00:00:00Z")
        await manager.until_mailed(ONCALL, "RESOLVED")
    told = {call["groupLabels"]["alertname"] for call in manager.calls}
    assert told == {"AgentloopDown", "AgentloopSloBurningFast", "AgentloopGatewayDown"}
    assert {call["version"] for call in manager.calls} == {"4"}
    assert "AgentloopSpoolOld" not in everything
    assert "AgentloopSloBurningSlowly" not in everything
    assert "AgentloopHostIdle" not in everything
    assert all(len(recipients) == 1 for recipients, _, _ in manager.mails)
