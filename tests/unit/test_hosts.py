"""Who may boot test hosts."""

from __future__ import annotations

import os

import pytest

from tests.hosts import NotRootError, see_that_we_are_root


def test_another_user_than_root_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotRootError, match="run these tests as root, or leave them out with -m 'not soak'"):
        see_that_we_are_root()


def test_root_may_boot_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    see_that_we_are_root()
