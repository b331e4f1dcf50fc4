"""Records out of files of any size and shape: streamed, and every fault named with its line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from training.datasets import reading
from training.datasets.reading import BadFileError, Records

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def written(tmp_path: Path, text: str | bytes, name: str = "set.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(tmp_path: Path, text: str | bytes) -> list[tuple[int, dict[str, Any]]]:
    return list(Records(written(tmp_path, text)))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"a": 1}\n{"a": 2}\n', [1, 2]),
        ('{"a": 1}\n\n\r\n{"a": 2}', [1, 4]),
        ('\ufeff{"a": 1}{"a": 2}', [1, 1]),
        ('[{"a": 1}, {"a": 2}]', [1, 1]),
        ('\n[\n  {\n    "a": 1\n  },\n  {"a":\n 2}\n]\n', [3, 6]),
    ],
)
def test_json_lines_and_arrays_are_read_with_the_line_of_each_record(
    tmp_path: Path, text: str, lines: list[int]
) -> None:
    assert read(tmp_path, text) == [(lines[0], {"a": 1}), (lines[1], {"a": 2})]


def test_an_empty_array_has_no_record_and_one_pretty_object_is_one(tmp_path: Path) -> None:
    assert read(tmp_path, " [ ]\n") == []
    assert read(tmp_path, json.dumps({"a": {"b": [1]}}, indent=4)) == [(1, {"a": {"b": [1]}})]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "the file is empty"),
        (" \n\n", 3, "the file is empty"),
        ("hello", 1, "must be a JSON object"),
        ('{"a": 1}\n[]\n', 2, "must be a JSON object"),
        ('{"a": 1}\n{"a": }\n{"a": 3}', 2, "Expecting value"),
        ('{"a": 1}\n{"a": 1,\n "b"', 3, "ends there"),
        ('{"a": "half', 1, "ends there"),
        ('{"a": NaN}', 1, "NaN is not a number"),
        ('{"a": ' + "9" * 5000 + "}", 1, "it is not JSON"),
        ('[{"a": 1}', 1, "cut off"),
        ('[{"a": 1},', 1, "cut off"),
        ('[{"a": 1} {"a": 2}]', 1, "a `,` or `]` is expected"),
        ('[{"a": 1}]\n{"a": 2}', 2, "must end there"),
        ('[{"a": 1},]', 1, "must be a JSON object"),
        ('{"a": "' + "\x00" + '"}', 1, "control character"),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", 1, "nested too deeply"),
        (b'{"a": "\xff"}', 1, "it is not UTF-8"),
        (b'{"a": "\xc3', 1, "it is not UTF-8"),
        (b"\x00\x00\x00", 1, "must be a JSON object"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, text: str | bytes, line: int, said: str) -> None:
    with pytest.raises(BadFileError) as told:
        read(tmp_path, text)
    assert f"set.jsonl, line {line}: " in str(told.value) and said in str(told.value)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(), JSON, max_size=3), min_size=1, max_size=6),
    st.booleans(),
    st.integers(1, 9),
)
def test_whatever_is_written_is_read_however_small_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]], array: bool, piece: int
) -> None:
    text = json.dumps(values, indent=1) if array else "\n".join(map(json.dumps, values))
    path = written(tmp_path_factory.mktemp("set"), text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_PIECE", piece)
        patch.setattr(reading, "_LONGEST_START", 64)
        assert [value for _, value in Records(path)] == values


def test_memory_is_bounded_by_a_record_and_not_by_the_file(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    path = written(tmp_path, line * 20_000)  # 20 MB
    tracemalloc.start()
    try:
        assert sum(1 for _ in Records(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_a_record_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_CHARACTERS", 10_000)
    monkeypatch.setattr(reading, "_PIECE", 1000)
    with pytest.raises(BadFileError, match="line 2: the record has more than 10000 characters"):
        read(tmp_path, '{"a": 1}\n{"a": "' + "x" * 100_000 + '"}')


@pytest.mark.parametrize("number", [200, 299, 300, 399])
def test_held_out_items_of_the_leaderboard_are_passed_over_unparsed(tmp_path: Path, number: int) -> None:
    sealed = f'{{"id": "simple_python_{number}", this is not even JSON'
    records = Records(
        written(tmp_path, f'{{"id": "simple_python_1"}}\n{sealed}\n{{"id": "simple_python_10"}}')
    )
    assert [line for line, _ in records] == [1, 3]
    assert records.held_out == 1
    last = Records(written(tmp_path, sealed, "last.json"))
    assert list(last) == [] and last.held_out == 1


def test_parquet_is_read_row_by_row_and_held_out_rows_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    names = ["a", "simple_python_300", "simple_python_7"]
    parquet.write_table(pa.table({"id": names, "n": [1, 2, 3]}), path)
    records = Records(path)
    assert list(records) == [(1, {"id": "a", "n": 1}), (3, {"id": "simple_python_7", "n": 3})]
    assert records.held_out == 1


def test_parquet_that_is_none_or_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    parquet.write_table(pa.table({"id": ["a"] * 1000}), path)
    for content in (b"", b"PAR1", path.read_bytes()[:-20]):
        with pytest.raises(BadFileError, match=r"set.parquet, after row 0: it is no Parquet"):
            list(Records(written(tmp_path, content, "set.parquet")))


def test_a_page_is_one_record_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(Records(written(tmp_path, "<p>ä</p>", "a.html"))) == [(1, {"html": "<p>ä</p>"})]
    with pytest.raises(BadFileError, match=r"a.html: it is not UTF-8"):
        list(Records(written(tmp_path, b"\xff", "a.html")))
    monkeypatch.setattr(reading, "MOST_CHARACTERS", 3)
    with pytest.raises(BadFileError, match=r"a.html: the page has more than 3 bytes"):
        list(Records(written(tmp_path, "<p>", "a.html"))) + list(Records(written(tmp_path, "<pp>", "a.html")))
