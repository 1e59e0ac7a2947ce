"""Raw rows out of files, one after the other: JSONL, a JSON array, Parquet, CSV, a hub data set; never a whole file.

Each comes with its place (`file:line`, `file row N`), for whatever is to be said about it.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe.data.sources import Origin, hub_rows
from recipe.errors import UserError

CHUNK_CHARACTERS = 2**20
LONGEST_CHARACTERS = 2**28  # of one row
PARQUET_ROWS = 512
SPACE = re.compile(r"\s*")
Raw = tuple[str, Any]  # where, values


def raw_rows(origin: Origin) -> Iterator[Raw]:
    """Raises UserError with the place of what cannot be read, and where there is no row at all."""
    found = False
    for raw in _all(origin):
        found = True
        yield raw
    if not found:
        raise UserError(f"{origin.key} is `{origin.path}`: has no rows, expected one JSON object per line")


def _all(origin: Origin) -> Iterator[Raw]:
    if not origin.files:
        for number, values in enumerate(hub_rows(origin)):
            yield f"{origin.path} row {number}", _without_nulls(values)
    for file in origin.files:
        with _readable(file):
            yield from _reader(file)


def _reader(file: Path) -> Iterator[Raw]:
    match file.suffix.lower():
        case ".parquet":
            return _parquet(file)
        case ".csv":
            return _csv(file)
        case ".json" if _is_array(file):
            return _json(file)
    return _jsonl(file)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    kind = {".csv": "CSV", ".json": "JSON"}.get(file.suffix.lower(), "JSONL")
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}), expected {kind} in UTF-8") from None
    except PermissionError:
        raise UserError(f"{file}: permission denied; make it readable (chmod a+r {file})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


def _jsonl(file: Path) -> Iterator[Raw]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}:{number}"
                try:
                    yield where, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{where}: not valid JSON ({_problem(error)}), expected one object per line"
                    ) from None


def _problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]


def _is_array(file: Path) -> bool:
    with open(file, encoding="utf-8-sig") as text:
        while (letter := text.read(1)).isspace():
            pass
        return letter == "["


def _json(file: Path) -> Iterator[Raw]:
    """The elements of an array, decoded one at a time from a buffer that holds some of them."""
    decoder = json.JSONDecoder()
    with open(file, encoding="utf-8-sig") as text:
        buffer = text.read(CHUNK_CHARACTERS).lstrip()[1:]
        at, number, comma, ended = 0, 0, True, False
        while True:
            at = _behind_space(buffer, at)
            if buffer[at : at + 1] == "]" and (not comma or number == 0):
                if (buffer[at + 1 :] + text.read()).strip():
                    raise UserError(f"{file}: has text behind the array, expected one array of objects")
                return
            follows, problem = "", "expected `,` or `]` behind it"
            try:
                values, end = decoder.raw_decode(buffer, at)
                end = _behind_space(buffer, end)
                follows = buffer[end : end + 1]  # a number at the buffer's end might go on
            except (ValueError, RecursionError) as error:
                problem = error.msg if isinstance(error, json.JSONDecodeError) else _problem(error)
            if follows in (",", "]") and follows:
                yield f"{file} row {number + 1}", values
                number, comma = number + 1, follows == ","
                at = end + comma
            elif ended or follows or len(buffer) - at > LONGEST_CHARACTERS:
                raise UserError(
                    f"{file} row {number + 1}: not valid JSON ({problem}), expected an array of objects"
                )
            if not ended and (not follows or len(buffer) - at < CHUNK_CHARACTERS // 2):
                more = text.read(max(CHUNK_CHARACTERS, len(buffer) - at))
                buffer, at, ended = buffer[at:] + more, 0, not more


def _behind_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _parquet(file: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", _without_nulls(values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        said = str(error).strip().splitlines()
        raise UserError(
            f"{file}: cannot be read as Parquet behind row {number} ({said[0][:150] if said else type(error).__name__}); "
            "fetch or make it again"
        ) from None


def _without_nulls(values: Any) -> Any:
    """A table has every column in every row, and every field in every entry: what is null is not there."""
    if isinstance(values, dict):
        return {key: _without_nulls(value) for key, value in values.items() if value is not None}
    return [_without_nulls(value) for value in values] if isinstance(values, list) else values


def _csv(file: Path) -> Iterator[Raw]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(file, encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, strict=True)
        try:
            names = next(rows, None)
            if names is None:
                return
            if len(set(names)) < len(names):
                twice = max(names, key=names.count)
                raise UserError(f"{file}:1: names the column `{twice}` twice, expected each one once")
            for row in rows:
                if not row:
                    continue
                if len(row) != len(names):
                    raise UserError(
                        f"{file}:{rows.line_num}: has {len(row)} fields, expected {len(names)} "
                        f"({', '.join(names)[:100]})"
                    )
                yield f"{file}:{rows.line_num}", dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{file}:{rows.line_num}: not valid CSV ({error}), expected a header and rows"
            ) from None
