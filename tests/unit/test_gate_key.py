"""Which sessions gate is drawn with a secret: no caller can steer its own into the gate, or out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_curate import frozen, traffic
from training import curate, gate_key
from training.learned import is_for_gate
from training.lessons import Lesson

SHARE = 0.15


def gated(key: bytes) -> set[int]:
    """Which of 400 sessions gate."""
    return {number for number in range(400) if is_for_gate(lesson(session_id=f"s{number}"), SHARE, key)}


def lesson(session_id: str) -> Lesson:
    nothing: frozenset[str] = frozenset()
    return Lesson("i", "c", session_id, "demonstrated", "p", "q", "", nothing, "", "a", nothing)


def test_who_does_not_know_the_key_cannot_tell_which_sessions_gate() -> None:
    ours, other, public = gated(b"a" * 32), gated(b"b" * 32), gated(b"")
    assert gated(b"a" * 32) == ours, "the same every night"
    for drawn in (ours, other, public):
        assert 30 < len(drawn) < 90
    for guess in (other, public):
        assert len(ours & guess) < 30, "no more than by luck"


def test_the_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = gate_key.of(tmp_path / "state")
    key = gate_key.read(path)
    assert (len(key), path.stat().st_mode & 0o777) == (32, 0o600)
    assert gate_key.read(gate_key.of(tmp_path / "state")) == key
    assert [each.name for each in path.parent.iterdir()] == ["gate.key"]


def test_of_two_nights_that_make_the_key_at_once_both_have_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: False)  # as both see it
    first = gate_key.read(gate_key.of(tmp_path))
    assert gate_key.read(gate_key.of(tmp_path)) == first
    assert [each.name for each in tmp_path.iterdir()] == ["gate.key"]


def test_a_file_that_is_no_key_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "gate.key").write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes, and a key of the gate has 32: put back"):
        gate_key.read(gate_key.of(tmp_path))


def test_a_dataset_tells_by_which_key_it_was_drawn_and_not_the_key(tmp_path: Path) -> None:
    directory = frozen(tmp_path / "20260101T000000Z", traffic(0, 60))
    key = gate_key.of(tmp_path)
    first = curate.run(directory, key_file=key)
    assert curate.run(directory, key_file=key) == first
    assert gate_key.read(key).hex() not in (directory / "dataset" / "dataset.json").read_text()
    key.write_bytes(b"b" * 32)
    again = curate.run(directory, key_file=key)
    assert again["inputs"]["files"]["gate_key"] != first["inputs"]["files"]["gate_key"]
