"""Options that mean the same to several commands."""

from __future__ import annotations

from typing import Annotated

import typer

AliasOption = Annotated[str, typer.Option(help="The name of the model to ask.")]
VersionOption = Annotated[str, typer.Option(help="One model version; needs the scope admin.")]
SessionOption = Annotated[str, typer.Option("--session", help="The conversation this belongs to.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 (greedy) to 2.")]
TopPOption = Annotated[float | None, typer.Option(help="Above 0 to 1.")]
TopKOption = Annotated[int | None, typer.Option(help="1 to 1000.", min=0)]
MaxTokensOption = Annotated[int | None, typer.Option(help="1 to 8192.", min=0)]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
TimeoutOption = Annotated[float, typer.Option(help="Seconds.", min=0.001)]
EventsOption = Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")]
SystemOption = Annotated[str, typer.Option(help="Instructions that come before it.")]
