"""What the one who watches sees: steps, and what goes on in the one that runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from rich.console import Console
from rich.markup import escape

REDRAW_SECONDS = 0.5
QUIET_SECONDS = 15.0  # without a terminal: a line so often


class Screen:
    """Prints steps; in a terminal a live line, else a line every now and then."""

    def __init__(self, console: Console | None = None, started: float | None = None) -> None:
        """`started` is the time (epoch) of the command."""
        self.console = console or Console(highlight=False)
        self._started = time.time() if started is None else started

    @property
    def seconds(self) -> float:
        """Since the command was given."""
        return time.time() - self._started

    def step(self, text: str) -> None:
        """A new step begins."""
        self._line(f"[bold cyan]{self._clock()}[/] [bold]{escape(text)}[/]")

    def note(self, text: str) -> None:
        """Something worth a line happened."""
        self._line(f"[dim]{self._clock()}[/] {escape(text)}")

    def broken(self, text: str) -> None:
        """The demo ends here."""
        self._line(f"[bold red]The loop is broken.[/] {escape(text)}")

    @asynccontextmanager
    async def watching(self, describe: Callable[[], str]) -> AsyncIterator[None]:
        """Show what `describe()` says, again and again, while the body runs."""
        task = asyncio.create_task(self._show(describe))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _show(self, describe: Callable[[], str]) -> None:
        if not self.console.is_terminal:
            while True:
                await asyncio.sleep(QUIET_SECONDS)
                self.note(describe())
        with self.console.status("") as status:
            while True:
                status.update(f"[dim]{self._clock()}[/] {escape(describe())}")
                await asyncio.sleep(REDRAW_SECONDS)

    def _line(self, markup: str) -> None:
        self.console.print(markup, soft_wrap=True)  # the terminal wraps; a log keeps the line whole

    def _clock(self) -> str:
        minutes, seconds = divmod(int(self.seconds), 60)
        return f"{minutes:2d}:{seconds:02d}"
