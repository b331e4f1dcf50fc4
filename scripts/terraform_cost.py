"""What an environment of infra/terraform costs a month, from its settings and a table of prices.

`python -m scripts.terraform_cost` reads infra/terraform/<environment>/settings.yaml and prices.yaml;
nothing is asked of AWS. It is an estimate: on-demand list prices with their date, and an assumed use.

Exit: 0 within the budgets, 1 a file, a size or a price is missing or wrong, 3 an environment costs more
at its largest than its budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

FOLDER = Path(__file__).resolve().parents[1] / "infra" / "terraform"
ENVIRONMENTS = ("stage", "prod")
OVER_BUDGET = 3
# What the modules make, beside what settings say: their tests count them.
KEYS, SECRETS, ALARMS = 3, 2, 4

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class CostError(Exception):
    """It cannot be told; the text says which value is missing or wrong."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the bill: what, how many of which unit a month, and USD a month."""

    item: str
    quantity: float
    unit: str
    usd: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """An environment's bill a month, with the fewest and with the most hosts, in USD."""

    environment: str
    region: str
    fewest_hosts: list[Line]
    usd: float
    usd_most_hosts: float
    budget_usd: float

    @property
    def holds(self) -> bool:
        """Whether it stays within its budget with the most hosts."""
        return self.usd_most_hosts <= self.budget_usd


@app.command()
def cost(
    environments: Annotated[
        list[str] | None, typer.Argument(help="stage, prod; both if none is named.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="infra/terraform, or a copy of it.")] = FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Estimate the monthly cost of environments."""
    try:
        prices = _read(folder / "prices.yaml")
        estimates = [
            estimate(name, _read(folder / name / "settings.yaml"), prices)
            for name in environments or ENVIRONMENTS
        ]
    except (CostError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        bills = [asdict(one) | {"holds": one.holds} for one in estimates]
        typer.echo(json.dumps({"prices": str(prices.get("date")), "environments": bills}))
    else:
        typer.echo(f"list prices of {prices.get('date')}, USD a month; see infra/terraform/prices.yaml")
        typer.echo("\n".join(text for one in estimates for text in _table(one)))
    if not all(one.holds for one in estimates):
        raise typer.Exit(OVER_BUDGET)


def estimate(name: str, settings: Mapping[str, Any], prices: Mapping[str, Any]) -> Estimate:
    """The bill of an environment.

    Raises:
        CostError: if a setting or a price is missing or is no number of at least 0.
    """
    region = str(settings.get("region"))
    table = prices.get(region)
    if not isinstance(table, Mapping):
        raise CostError(f"prices.yaml has no prices of region {region!r} ({name}/settings.yaml): add them")
    fewest = _lines(settings, prices, table, int(_number(settings, "min_hosts")))
    most = _lines(settings, prices, table, int(_number(settings, "max_hosts")))
    return Estimate(
        name,
        region,
        fewest,
        round(sum(line.usd for line in fewest), 2),
        round(sum(line.usd for line in most), 2),
        _number(settings, "monthly_budget_usd"),
    )


def _lines(
    settings: Mapping[str, Any], prices: Mapping[str, Any], table: Mapping[str, Any], hosts: int
) -> list[Line]:
    hours = _number(prices, "hours_a_month")
    zones = len(settings.get("zones") or ())
    nats = zones if settings.get("nat_per_zone") else 1
    databases = 2 if settings.get("multi_az") else 1
    types, size = settings.get("instance_types") or ("",), str(settings.get("database_class"))
    host_price = _number(_part(table, "hosts"), str(types[0]))
    if settings.get("spot"):
        host_price *= _number(prices, "spot_share")
    use = _part(settings, "use")
    rows = [
        (f"{types[0]}{', spot' if settings.get('spot') else ''}", hosts * hours, "h", host_price),
        ("hosts' disks", hosts * _number(settings, "disk_gib"), "GiB", _number(table, "host_disk_gib")),
        ("hosts' metrics", hosts, "hosts", _number(table, "detailed_monitoring")),
        (size, databases * hours, "h", _number(_part(table, "databases"), size)),
        (
            "database's disks",
            databases * _number(settings, "database_gib"),
            "GiB",
            _number(table, "database_disk_gib"),
        ),
        ("NAT gateways", nats * hours, "h", _number(table, "nat_hour")),
        ("their addresses", nats * hours, "h", _number(table, "public_ip_hour")),
        ("through NAT", _number(use, "nat_gib"), "GiB", _number(table, "nat_gib")),
        ("S3", _number(use, "s3_gib"), "GiB", _number(table, "s3_gib")),
        ("logs", _number(use, "logs_gib"), "GiB", _number(table, "logs_gib")),
        ("keys", KEYS, "keys", _number(table, "key")),
        ("secrets", SECRETS, "secrets", _number(table, "secret")),
        ("alarms", ALARMS, "alarms", _number(table, "alarm")),
    ]
    return [Line(item, quantity, unit, round(quantity * price, 2)) for item, quantity, unit, price in rows]


def _part(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = settings.get(name)
    if not isinstance(part, Mapping):
        raise CostError(f"{name} is {part!r}; it must be a mapping")
    return part


def _number(settings: Mapping[str, Any], name: str) -> float:
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise CostError(f"{name} is {value!r}; it must be a number of at least 0")
    return value


def _read(path: Path) -> Mapping[str, Any]:
    try:
        read = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CostError(f"{path} is no YAML: {error}") from error
    if not isinstance(read, Mapping):
        raise CostError(f"{path} is no mapping")
    return read


def _table(one: Estimate) -> list[str]:
    return [
        f"\n{one.environment} ({one.region})",
        *(
            f"  {line.item:<22}{line.quantity:>10,.0f} {line.unit:<8}{line.usd:>10,.2f}"
            for line in one.fewest_hosts
        ),
        f"  {'in all':<41}{one.usd:>10,.2f}",
        f"  {'with the most hosts':<41}{one.usd_most_hosts:>10,.2f}"
        + (
            f"   budget {one.budget_usd:,.2f}"
            if one.holds
            else f"   MORE THAN ITS BUDGET {one.budget_usd:,.2f}"
        ),
    ]


if __name__ == "__main__":
    app(prog_name="python -m scripts.terraform_cost")
