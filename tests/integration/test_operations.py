"""Playbooks on real hosts: from bare to a service, a deployment that nobody feels, and back (`make soak`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.estate import GATEWAY, SETTINGS, Estate, Traffic, estate, release_of

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]

STREAMS = 50


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory, base_gguf: Path) -> Iterator[Estate]:
    with estate(tmp_path_factory.mktemp("estate"), base_gguf, ["server1"], SETTINGS) as there:
        yield there


def test_bare_hosts_are_a_service_after_one_run_and_no_caller_feels_a_deployment_or_the_way_back(
    company: Estate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = release_of(tmp_path_factory.mktemp("first"))
    second = release_of(tmp_path_factory.mktemp("second"), "# another\n")

    bare = company.play("site", "-e", f"release={first}")
    assert bare.code == 0, bare.out
    again = company.play("site", "-e", f"release={first}")
    assert (again.code, again.changed) == (0, dict.fromkeys(company.hosts, 0)), again.out
    score = company.hosts["server1"].run("systemd-analyze security agentloop@green --no-pager | tail -1")
    assert float(score.split(":")[1].split()[0]) <= 2.0, score

    address = f"grpcs://{company.hosts[GATEWAY].address}:50051"
    ca_file = company.folder / "inventory/tls/ca.crt"
    with Traffic(address, company.token("callers"), ca_file, STREAMS).running() as traffic:
        traffic.wait_for(STREAMS)
        deployed = company.play("deploy", "-e", f"release={second}")
        assert deployed.code == 0, deployed.out
        traffic.wait_for(STREAMS)
        back = company.play("rollback_code")
        assert (back.code, back.changed) == (0, {GATEWAY: 1}), back.out
        traffic.wait_for(STREAMS)
    assert traffic.failed == []
