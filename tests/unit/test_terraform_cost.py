"""What an environment costs is told from its settings and the table of prices, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from scripts.terraform_cost import FOLDER, CostError, app, estimate

SETTINGS: dict[str, Any] = {
    "region": "here",
    "zones": ["a", "b", "c"],
    "nat_per_zone": True,
    "instance_types": ["gpu.big", "gpu.small"],
    "spot": False,
    "min_hosts": 1,
    "max_hosts": 3,
    "disk_gib": 100,
    "database_class": "db.one",
    "database_gib": 10,
    "multi_az": True,
    "monthly_budget_usd": 10_000,
    "use": {"s3_gib": 1000, "nat_gib": 10, "logs_gib": 1},
}
PRICES: dict[str, Any] = {
    "hours_a_month": 730,
    "spot_share": 0.5,
    "here": {
        "hosts": {"gpu.big": 1.0},
        "databases": {"db.one": 0.1},
        "host_disk_gib": 0.1,
        "database_disk_gib": 0.2,
        "nat_hour": 0.05,
        "nat_gib": 0.05,
        "public_ip_hour": 0.005,
        "s3_gib": 0.02,
        "logs_gib": 0.5,
        "key": 1,
        "secret": 0.4,
        "alarm": 0.1,
        "detailed_monitoring": 2,
    },
}


def test_each_line_is_quantity_times_price_and_a_standby_doubles_the_database() -> None:
    bill = estimate("stage", SETTINGS, PRICES)
    usd = {line.item: line.usd for line in bill.fewest_hosts}
    assert usd["gpu.big"] == 730
    assert usd["db.one"] == 146
    assert usd["database's disks"] == 4
    assert usd["NAT gateways"] == 109.5
    assert bill.usd == round(sum(usd.values()), 2)
    assert bill.usd_most_hosts == pytest.approx(bill.usd + 2 * (730 + 10 + 2))
    assert bill.holds


def test_spot_costs_its_share() -> None:
    bill = estimate("stage", SETTINGS | {"spot": True, "nat_per_zone": False}, PRICES)
    usd = {line.item: line.usd for line in bill.fewest_hosts}
    assert usd["gpu.big, spot"] == 365
    assert usd["NAT gateways"] == 36.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"region": "nowhere"}, "no prices of region 'nowhere'"),
        ({"instance_types": ["gpu.new"]}, "gpu.new is None"),
        ({"database_class": "db.new"}, "db.new is None"),
        ({"min_hosts": "three"}, "min_hosts is 'three'"),
        ({"disk_gib": -1}, "disk_gib is -1"),
        ({"disk_gib": True}, "disk_gib is True"),
        ({"max_hosts": float("inf")}, "max_hosts is inf"),
        ({"use": None}, "use is None"),
    ],
)
def test_what_has_no_price_or_is_no_number_is_refused_by_its_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CostError, match=said):
        estimate("stage", SETTINGS | change, PRICES)


def test_both_environments_have_prices_and_stay_within_their_budgets() -> None:
    done = CliRunner().invoke(app, ["--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert [one["environment"] for one in told["environments"]] == ["stage", "prod"]
    assert all(one["holds"] and one["usd"] > 0 for one in told["environments"])
    assert told["prices"] == str(yaml.safe_load((FOLDER / "prices.yaml").read_text())["date"])


def test_more_than_the_budget_is_told_and_exits_with_3(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/settings.yaml").write_text(yaml.safe_dump(SETTINGS | {"monthly_budget_usd": 1}))
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(PRICES))
    done = CliRunner().invoke(app, ["stage", f"--folder={tmp_path}"])
    assert done.exit_code == 3
    assert "MORE THAN ITS BUDGET 1.00" in done.output
    assert "gpu.big" in done.output


@pytest.mark.parametrize("text", ["", "- a list", "{half", "\0"])
def test_a_file_that_is_no_settings_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/settings.yaml").write_text(text)
    shutil.copy(FOLDER / "prices.yaml", tmp_path)
    done = CliRunner().invoke(app, ["stage", f"--folder={tmp_path}"])
    assert done.exit_code == 1
    assert "error:" in done.output


def test_an_environment_that_is_not_there_is_refused() -> None:
    done = CliRunner().invoke(app, ["production"])
    assert done.exit_code == 1
    assert "settings.yaml" in done.output
