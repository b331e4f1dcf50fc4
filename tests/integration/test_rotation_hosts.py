"""Every credential is replaced under traffic, on real hosts, and no request fails (`make soak`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.estate import GATEWAY, SETTINGS, Traffic, estate, release_of

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]

STREAMS = 10
TOKEN = "/etc/agentloop/probe.token"


def test_passwords_certificates_and_tokens_are_rotated_and_no_caller_feels_it(
    tmp_path_factory: pytest.TempPathFactory, base_gguf: Path
) -> None:
    release = release_of(tmp_path_factory.mktemp("release"))
    with estate(tmp_path_factory.mktemp("estate"), base_gguf, ["server1"], SETTINGS) as company:
        bare = company.play("site", "-e", f"release={release}")
        assert bare.code == 0, bare.out
        server = company.hosts["server1"]
        before = server.run(f"cat {TOKEN}; touch --date='2 days ago' {TOKEN}").strip()
        address = f"grpcs://{company.hosts[GATEWAY].address}:50051"
        ca_file = company.folder / "inventory/tls/ca.crt"
        with Traffic(address, company.token("callers"), ca_file, STREAMS).running() as traffic:
            traffic.wait_for(STREAMS)
            for name in company.hosts:
                company.certify(name)
            company.write_secrets("another password")
            rotated = company.play("rotate-credentials", "-e", f"release={release}")
            assert rotated.code == 0, rotated.out
            traffic.wait_for(STREAMS)
        assert traffic.failed == []

        assert "another%20password" in server.run("cat /etc/agentloop/blue/database_url")
        assert server.run(f"cat {TOKEN}").strip() != before
        listed = server.run(
            "AGENTLOOP_CONFIG=/etc/agentloop/blue/server.yml"
            " AGENTLOOP_DATABASE_URL_FILE=/etc/agentloop/blue/database_url"
            " /opt/agentloop/blue/bin/python -m grpc_server tokens list --json"
        )
        assert f'"key_id": "{before[3:15]}"' in listed
        assert listed.count('"state": "revoked"') == 1
        again = company.play("rotate-credentials", "-e", f"release={release}")
        assert (again.code, again.changed) == (0, dict.fromkeys(company.hosts, 0)), again.out
