"""An event loop whose clock jumps to the next timer: hours pass in a moment, and always in the same way."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Jumping(selectors.SelectSelector):
    """Waits for nothing: the time that it was to wait has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("nothing is left that could happen: everybody waits for somebody")
        self.now += max(0.0, timeout)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def clock() -> float:
    """Seconds on the running loop's clock."""
    return asyncio.get_running_loop().time()


def in_virtual_time(main: Coroutine[Any, Any, Result]) -> Result:
    """What `main` returns."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)
