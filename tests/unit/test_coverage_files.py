"""A measurement that a killed process left half written does not cost the others."""

from __future__ import annotations

from pathlib import Path

from coverage import CoverageData

from tests.coverage_files import remove_damaged, untraced


def measured(path: Path) -> Path:
    data = CoverageData(str(path))
    data.add_lines({f"/a/module_{number}.py": range(1, 400) for number in range(200)})
    data.write()
    return path


def test_damaged_measurements_are_removed_and_whole_ones_stay(tmp_path: Path) -> None:
    whole, cut, spoilt = (measured(tmp_path / f".coverage.host.{name}") for name in ("1", "2", "3"))
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    spoilt.write_bytes(content[:4096] + b"\xff" * 4096 + content[8192:])
    empty, other = tmp_path / ".coverage.host.4", tmp_path / "notes"
    empty.touch()
    other.touch()
    assert set(remove_damaged(tmp_path / ".coverage")) == {cut, spoilt, empty}
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, other.name}


def test_a_process_that_is_not_traced_keeps_the_rest_of_its_environment() -> None:
    assert untraced({"COVERAGE_PROCESS_CONFIG": "{}", "PATH": "/bin"}) == {"PATH": "/bin"}
