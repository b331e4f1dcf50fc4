"""How a demo's figures look in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from demo.tally import Tally

NONE = "-"


def table(shown: Mapping[str, Any], tally: Tally) -> Table:
    """The figures of demo.json, and what went wrong on purpose."""
    made = Table(title="one turn of the loop", title_justify="left", show_header=False, pad_edge=False)
    made.add_column(style="bold")
    made.add_column()
    for name, text in rows(shown, tally):
        made.add_row(name, escape(text))
    return made


def rows(shown: Mapping[str, Any], tally: Tally) -> list[tuple[str, str]]:
    """Name and text of each row, in the order of the loop."""
    apart = ", ".join(f"{count} {kind}" for kind, count in tally.apart().items())
    return [
        ("requests", f"{shown['requests']}, of which failed: {shown['requests_failed']}"),
        ("went wrong on purpose", apart or NONE),
        ("answered by", _counts(tally.by_version())),
        ("first token", f"{_number(shown['ttft_p50_ms'])} ms median, {_number(shown['ttft_p95_ms'])} ms p95"),
        ("rows accepted / logged", f"{shown['rows_accepted']} / {shown['rows_logged']}"),
        ("rows quarantined", _number(shown["rows_quarantined"])),
        ("examples kept", _number(shown["examples_kept"])),
        ("examples excluded", _counts(shown["examples_excluded"] or {})),
        ("loss", f"{_number(shown['loss_first'])} to {_number(shown['loss_last'])}"),
        ("training speed", f"{_number(shown['tokens_per_s'])} tokens/s"),
        ("peak memory", f"{_number(shown['peak_memory_gb'])} GB"),
        ("GGUF", f"{_number(shown['gguf_mb'])} MB"),
        ("base, held to the schema", _accuracy(shown, "base_constrained")),
        ("champion", _accuracy(shown, "champion")),
        ("candidate", _accuracy(shown, "candidate")),
        ("verdict", str(shown["verdict"])),
        ("route before", _route(shown["route_before"])),
        ("route after", _route(shown["route_after"])),
        (
            "rollout",
            f"{_number(shown['rollout_requests'])} requests,"
            f" of which failed: {_number(shown['rollout_failed_requests'])}",
        ),
        ("time after installation", f"{shown['seconds'] / 60:.1f} min"),
    ]


def _accuracy(shown: Mapping[str, Any], subject: str) -> str:
    accuracy, interval = shown[f"{subject}_accuracy"], shown[f"{subject}_accuracy_ci"]
    if accuracy is None:
        return NONE
    return f"{accuracy:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count) or NONE


def _route(targets: Sequence[Mapping[str, Any]]) -> str:
    return (
        ", ".join(f"{each['model_version']} ({each['role']} {each['weight']} %)" for each in targets) or NONE
    )


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"
