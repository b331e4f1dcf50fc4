"""Makes infra/grafana/dashboards/*.json of dashboards.yaml, by Grafana's own builders, for Grafana 11.

python -m scripts.dashboards            write them
python -m scripts.dashboards --check    exit 1 if what is there is not what would be written
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import GraphThresholdsStyleConfig
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueTextMode, GraphThresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)

GRAFANA = Path(__file__).resolve().parents[1] / "infra" / "grafana"
SOURCE = DataSourceRef("prometheus", "${prometheus}")
TEXT = BigValueTextMode.VALUE_AND_NAME
WIDTH, HEIGHT = 8, 8
_KEYS = {
    "dashboard": {"title", "about", "instances", "rows"},
    "row": {"title", "panels"},
    "panel": {"title", "about", "shows", "unit", "width", "red_from", "red_below", "queries"},
    "query": {"legend", "query"},
}


def dashboards(described: Mapping[str, Any]) -> dict[str, str]:
    """The JSON of each dashboard, by its name.

    Raises:
        ValueError: for a key that is unknown; it is named.
    """
    return {name: _json(name, one) for name, one in described.items()}


def _json(name: str, described: Mapping[str, Any]) -> str:
    _known("dashboard", described)
    made = (
        dashboard.Dashboard(described["title"])
        .uid(f"agentloop-{name}")
        .description(described["about"])
        .tags(["agent-loop"])
        .refresh("30s")
        .time("now-30d" if name == "learning" else "now-6h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(dashboard.DatasourceVariable("prometheus").label("Prometheus").type("prometheus"))
    )
    if job := described.get("instances"):
        made.with_variable(
            dashboard.QueryVariable("instance")
            .label("Instance")
            .datasource(SOURCE)
            .query(f'label_values(up{{job="{job}"}}, instance)')
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    number = 0
    for row in described["rows"]:
        _known("row", row)
        number += 1
        made.with_row(dashboard.Row(row["title"]).id(number))
        for panel in row["panels"]:
            number += 1
            made.with_panel(_panel(panel).id(number))
    return json.dumps(made.build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _panel(described: Mapping[str, Any]) -> stat.Panel | timeseries.Panel:
    _known("panel", described)
    shows = described.get("shows", "lines")
    if shows not in ("stat", "lines"):
        raise ValueError(f"{described['title']}: shows is {shows!r}; it must be stat or lines")
    panel = stat.Panel().text_mode(TEXT) if shows == "stat" else timeseries.Panel().fill_opacity(10)
    panel.title(described["title"]).datasource(SOURCE).span(described.get("width", WIDTH)).height(HEIGHT)
    panel.unit(described.get("unit", "short"))
    if about := described.get("about"):
        panel.description(about)
    for letter, query in zip("ABCDEFGH", described["queries"], strict=False):
        _known("query", query)
        target = prometheus.Dataquery().expr(query["query"]).legend_format(query["legend"]).ref_id(letter)
        panel.with_target(target.instant() if shows == "stat" else target.range())
    if "red_from" in described or "red_below" in described:
        panel.thresholds(_thresholds(described))
        if isinstance(panel, timeseries.Panel):
            panel.thresholds_style(GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    return panel


def _thresholds(described: Mapping[str, Any]) -> dashboard.ThresholdsConfig:
    below = "red_below" in described
    at = float(described["red_below" if below else "red_from"])
    first, then = ("red", "green") if below else ("green", "red")
    steps = [Threshold(None, first), Threshold(at, then)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _known(kind: str, described: Mapping[str, Any]) -> None:
    if unknown := set(described) - _KEYS[kind]:
        raise ValueError(
            f"a {kind} has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(_KEYS[kind]))}"
        )


def stale(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """The files of a folder that are missing, other than wanted, or nobody's."""
    there = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    return sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))


def main(arguments: list[str] | None = None, grafana: Path = GRAFANA) -> int:
    """Write or check; the exit code."""
    parser = argparse.ArgumentParser(description="Make Grafana's dashboards of dashboards.yaml.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if they are stale")
    check = parser.parse_args(arguments).check
    wanted = dashboards(yaml.safe_load((grafana / "dashboards.yaml").read_text(encoding="utf-8")))
    folder = grafana / "dashboards"
    changed = stale(folder, wanted)
    if check and changed:
        print(f"{folder} is stale ({', '.join(changed)}): run 'make dashboards' and commit", file=sys.stderr)
        return 1
    for name in changed:
        path = folder / f"{name}.json"
        if name in wanted:
            path.write_text(wanted[name], encoding="utf-8")
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
