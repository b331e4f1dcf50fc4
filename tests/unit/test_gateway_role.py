"""HAProxy asks what gRPC servers answer, and knows the colours that the servers have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import yaml
from grpc_health.v1 import health_pb2

ROLES = Path(__file__).parents[2] / "infra/ansible/roles"


def variables(role: str, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROLES / role / kind / "main.yml").read_text())
    return found


def test_the_health_check_is_grpcs_own() -> None:
    parts = variables("gateway", "vars")["gateway_health_question"]
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    connection.initiate_connection()
    events = connection.receive_data(bytes.fromhex("".join(parts).replace(" ", "")))
    (asked,) = [event for event in events if isinstance(event, h2.events.RequestReceived)]
    headers = {bytes(name).decode(): bytes(value).decode() for name, value in asked.headers or []}
    assert headers == {
        ":method": "POST",
        ":scheme": "https",
        ":path": "/grpc.health.v1.Health/Check",
        ":authority": "health",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    (sent,) = [event for event in events if isinstance(event, h2.events.DataReceived)]
    assert sent.data == b"\0" * 5 + health_pb2.HealthCheckRequest().SerializeToString()
    assert any(isinstance(event, h2.events.StreamEnded) for event in events)


def test_only_serving_is_up() -> None:
    serving = health_pb2.HealthCheckResponse(status="SERVING").SerializeToString()
    answer = bytes.fromhex(variables("gateway", "vars")["gateway_health_answer"])
    assert answer == b"\0" + len(serving).to_bytes(4, "big") + serving


def test_gateways_servers_and_the_monitor_have_the_same_colours_and_ports() -> None:
    colours = variables("server", "defaults")["server_colours"]
    assert variables("gateway", "defaults")["gateway_colours"] == colours
    assert variables("monitoring", "defaults")["monitoring_colours"] == colours
    port = variables("gateway", "defaults")["gateway_metrics_port"]
    assert variables("monitoring", "defaults")["monitoring_gateway_metrics_port"] == port


def test_what_roles_install_is_in_the_base_image_of_test_hosts() -> None:
    image = (ROLES.parents[2] / "scripts/base_image.sh").read_text()
    wanted = [
        *variables("base", "defaults")["base_packages"],
        *variables("server", "vars")["server_packages"],
        *variables("monitoring", "vars")["monitoring_packages"],
        "prometheus-node-exporter",
        f"postgresql-{variables('postgres', 'defaults')['postgres_version']}",
        "haproxy",
        "pgbackrest",
    ]
    there = image[image.index("bare=(") : image.index("[[ $EUID")]
    assert [package for package in wanted if package not in there] == []
