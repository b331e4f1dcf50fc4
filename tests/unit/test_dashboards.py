"""Grafana's files: the dashboards that are made, and those by which a Grafana finds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from scripts.dashboards import GRAFANA, dashboards, main

# https://grafana.com/docs/grafana/latest/administration/provisioning/, of its keys those that are used.
DATASOURCES = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "datasources"],
    "properties": {
        "apiVersion": {"const": 1},
        "datasources": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "type", "access"],
                "properties": {
                    "name": {"type": "string"},
                    "uid": {"type": "string", "maxLength": 40, "pattern": "^[A-Za-z0-9_-]+$"},
                    "type": {"const": "prometheus"},
                    "access": {"enum": ["proxy", "direct"]},
                    "url": {"type": "string", "pattern": "^https?://"},
                    "isDefault": {"type": "boolean"},
                    "jsonData": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"timeInterval": {"type": "string", "pattern": r"^\d+(ms|[smhd])$"}},
                    },
                },
            },
        },
    },
}
PROVIDERS = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "providers"],
    "properties": {
        "apiVersion": {"const": 1},
        "providers": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "options"],
                "properties": {
                    "name": {"type": "string"},
                    "type": {"const": "file"},
                    "folder": {"type": "string"},
                    "allowUiUpdates": {"type": "boolean"},
                    "updateIntervalSeconds": {"type": "integer", "minimum": 1},
                    "options": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["path"],
                        "properties": {"path": {"type": "string", "pattern": "^/"}},
                    },
                },
            },
        },
    },
}


def made() -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (GRAFANA / "dashboards").glob("*.json")}


def test_what_is_committed_is_what_would_be_made() -> None:
    assert main(["--check"]) == 0
    assert set(made()) == {"service", "engine", "learning", "hosts"}


def test_what_is_stale_or_nobodys_is_told_and_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grafana = tmp_path / "grafana"
    shutil.copytree(GRAFANA, grafana)
    (grafana / "dashboards" / "hosts.json").write_text("{}")
    (grafana / "dashboards" / "engine.json").unlink()
    (grafana / "dashboards" / "old.json").write_text("{}")
    assert main(["--check"], grafana) == 1
    assert "(engine, hosts, old): run 'make dashboards' and commit" in capsys.readouterr().err
    assert main([], grafana) == 0
    assert main(["--check"], grafana) == 0


def test_a_misspelt_key_or_kind_of_panel_is_named() -> None:
    panel = {"title": "P", "queries": [{"legend": "l", "query": "up"}]}

    def of(panel: dict[str, Any]) -> dict[str, Any]:
        return {"d": {"title": "T", "about": "A", "rows": [{"title": "R", "panels": [panel]}]}}

    assert list(dashboards(of(panel))) == ["d"]
    with pytest.raises(ValueError, match="a panel has no units; it has about, "):
        dashboards(of(panel | {"units": "s"}))
    with pytest.raises(ValueError, match="shows is 'pie'"):
        dashboards(of(panel | {"shows": "pie"}))


def test_dashboards_are_of_grafanas_types_and_their_panels_do_not_overlap() -> None:
    register_default_plugins()
    for name, dashboard in made().items():
        again = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
        assert again == dashboard, name
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        cells = [
            (x, y)
            for at in (panel["gridPos"] for panel in panels)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        ]
        assert len(cells) == len(set(cells))
        assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize(("kind", "schema"), [("datasources", DATASOURCES), ("dashboards", PROVIDERS)])
def test_provisioning_files_have_the_documented_keys(kind: str, schema: dict[str, Any]) -> None:
    for path in (GRAFANA / "provisioning" / kind).iterdir():
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
