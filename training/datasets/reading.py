"""Records out of a file, one at a time: JSON Lines, an array, one object, or Parquet; a page is one record.

What is in memory is a piece of the file, or one record, whatever the file's size. Of JSON the line on which a
record begins is told, of Parquet the row. Held-out items of the leaderboard are dropped unparsed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from training import bfcl

MOST_CHARACTERS = 64 * 2**20
"""Of one record: a trajectory holds every page that it saw."""

_PIECE = 2**20  # bytes read at once
_NEAR_END = 16  # characters: an error so near to the end of a piece may only be that it ends there
_HELD_OUT = re.compile(r'\s*\{\s*"id"\s*:\s*"simple_python_(\d+)"')
_LONGEST_START = 256  # characters in which a held-out item shows what it is
_BLANK = re.compile(r"[ \t\r\n]*")

Told = Callable[[int], None]


class BadFileError(ValueError):
    """A file is not what it must be; the text says which, the line, the field, and what was expected."""


def is_held_out(text: str, start: int = 0) -> bool:
    """Whether the record that begins there is an item of the leaderboard that nothing may learn from."""
    found = _HELD_OUT.match(text, start)
    return found is not None and int(found[1]) not in bfcl.TRAFFIC_SIMPLE


class Records:
    """Iterates over the records of a file as (line or row from 1, object); counts what is held out.

    Raises:
        BadFileError: if it is no UTF-8, no JSON, or a record is no object, or larger than MOST_CHARACTERS.
    """

    def __init__(self, path: Path, told: Told = lambda _: None) -> None:
        """Read `path`; `told` is called with the bytes read since it was called last."""
        self.path = path
        self.held_out = 0
        self._told = told

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.path.suffix == ".parquet":
            yield from self._rows()
        elif self.path.suffix == ".html":
            yield 1, {"html": self._page()}
        else:
            with self.path.open("rb") as file:
                yield from _Json(self, file)

    def _page(self) -> str:
        with self.path.open("rb") as file:
            content = file.read(MOST_CHARACTERS + 1)
        self._told(len(content))
        if len(content) > MOST_CHARACTERS:
            raise BadFileError(f"{self.path}: the page has more than {MOST_CHARACTERS} bytes")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadFileError(f"{self.path}: it is not UTF-8") from None

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow as pa
        from pyarrow import parquet

        row = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                size = self.path.stat().st_size
                for batch in file.iter_batches(batch_size=256):
                    for value in batch.to_pylist():
                        row += 1
                        if str(value.get("id", "")).startswith("simple_python_") and is_held_out(
                            json.dumps({"id": value["id"]})
                        ):
                            self.held_out += 1
                        else:
                            yield row, value
                    self._told(size * batch.num_rows // max(1, file.metadata.num_rows))
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise BadFileError(f"{self.path}, after row {row}: it is no Parquet that can be read") from error

    def tell(self, count: int) -> None:
        """Say that so many bytes were read."""
        self._told(count)


class _Json:
    """JSON values after each other, or in one array."""

    def __init__(self, records: Records, file: BinaryIO) -> None:
        self._records = records
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder(parse_constant=_refuse).raw_decode
        self._text = ""
        self._at = 0  # where the next record begins in the text
        self._line = 1  # the line of that place
        self._ended = False

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self._skip_blank():
            self._fail("the file is empty; it must hold at least one record")
        in_array = self._text[self._at] == "["
        if in_array:
            self._step(1)
        first = True
        while self._skip_blank():
            if in_array and self._text[self._at] == "]":
                self._step(1)
                if self._skip_blank():
                    self._fail("something follows the end of the array; the file must end there")
                return
            if in_array and not first:
                if self._text[self._at] != ",":
                    self._fail("a `,` or `]` is expected after a record")
                self._step(1)
                if not self._skip_blank():
                    break
            first = False
            if self._drop_held_out():
                continue
            line = self._line
            yield line, self._record()
        if in_array:
            self._fail("the file ends in the midst of its array; it is cut off")

    def _record(self) -> dict[str, Any]:
        """The object that begins here."""
        if self._text[self._at] != "{":
            self._fail("a record must be a JSON object, which begins with `{`")
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except RecursionError:
                self._fail("the record is nested too deeply")
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _NEAR_END
                if cut and len(self._text) - self._at > MOST_CHARACTERS:
                    self._fail(f"the record has more than {MOST_CHARACTERS} characters")
                if not cut or not self._more():
                    self._step(error.pos - self._at)
                    self._fail(f"it is not JSON ({error.msg})" + (", and ends there" if cut else ""))
            except ValueError as error:
                self._fail(f"it is not JSON ({error})")
            else:
                self._step(end - self._at)
                return dict(value)

    def _drop_held_out(self) -> bool:
        """Pass over a held-out item, which is a line, unparsed."""
        while len(self._text) - self._at < _LONGEST_START and self._more():
            pass
        if not is_held_out(self._text, self._at):
            return False
        while (end := self._text.find("\n", self._at)) < 0 and self._more():
            pass
        self._step((end if end >= 0 else len(self._text)) - self._at)
        self._records.held_out += 1
        return True

    def _skip_blank(self) -> bool:
        """Go to the next character that is no blank; False at the end of the file."""
        while True:
            found = _BLANK.match(self._text, self._at)
            self._step(len(found[0]) if found else 0)
            if self._at < len(self._text):
                return True
            if not self._more():
                return False

    def _step(self, characters: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + characters)
        self._at += characters

    def _more(self) -> bool:
        """Read on, as much again as there is left, so that a large record is not parsed for every piece."""
        if self._ended:
            return False
        piece = self._file.read(max(_PIECE, len(self._text) - self._at))
        self._records.tell(len(piece))
        self._ended = not piece
        try:
            self._text = self._text[self._at :] + self._decode(piece, final=self._ended)
        except UnicodeDecodeError:
            self._fail("it is not UTF-8")
        self._at = 0
        return not self._ended

    def _fail(self, what: str) -> NoReturn:
        raise BadFileError(f"{self._records.path}, line {self._line}: {what}")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")
