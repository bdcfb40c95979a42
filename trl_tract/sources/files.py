"""Files and hub datasets -> records, one mapping of columns a row, read one at a time.

Knows nothing of judging, tokens or models.
"""

import csv
import datetime
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from trl_tract.files.addresses import Address
from trl_tract.files.export import json_columns
from trl_tract.files.journal import is_address
from trl_tract.text.secrets import without_secrets

FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
BENCHMARKS = {
    "feedback-bench": "prometheus-eval/Feedback-Bench",
    "feedback-collection": "prometheus-eval/Feedback-Collection",
}
"""Short names of data sets on the hub."""

_BENCHMARK_FILES = {
    name: f"eval/benchmark/data/{name.replace('-', '_')}_eval.json" for name in ("flask", "vicuna", "mt-bench")
}
_DELIMITERS = ",;\t"
_NOTHING = {"", "NA", "NULL", "null", "\\N", "#N/A"}
"""Cells without a value, as spreadsheets, R and databases write them; `nan` and `<NA>` are such in every file."""
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_BETWEEN = re.compile(r"[\s,]*")
_CHUNK = 2**20  # characters of a .json file that are looked at together

_PACKINGS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip or Excel"}
"""First bytes of files that are often named as what is in them."""

Record = Mapping[str, Any]


class _Repeating(dict[str, Any]):
    """An object of JSON with a name that it has twice: `name`."""

    name: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating = _Repeating(found)
    names = [name for name, _ in pairs]
    repeating.name = next(name for name in names if names.count(name) > 1)
    return repeating


def read_records(source: str) -> Iterable[Record | ValueError]:
    """The records of a file, or of a hub dataset; in place of a line of JSONL that is none, what is wrong with it.

    Args:
        source: A file (`.jsonl`; `.json` with a list of objects; `.csv` or `.tsv` with a header; `.parquet`), here or
            at an address that fsspec knows; one of `BENCHMARKS`, or a hub id. `ID:SPLIT` is a split other than `train`.

    Raises:
        FileNotFoundError: No such file, or no such dataset.
        ValueError: The file is of another kind, or a part of it cannot be read; the line is named.
    """
    path: Any = Address(source) if is_address(source) else Path(source)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
    readers[".parquet"] = _read_parquet
    kind = path.suffix.lower()
    if path.is_file() and kind in readers:
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty: it holds 0 bytes")
        if packed := _packing(path):
            raise ValueError(
                f"{path} holds {packed} data, although its name says otherwise. Unpack it, or save it as CSV UTF-8"
            )
        return readers[kind](path)
    if source and path.exists():
        kind = "a directory" if path.is_dir() else "not a supported file"
        raise ValueError(f"{path} is {kind}. Give one uncompressed file of type {', '.join(FILES)}, or a hub id")
    if kind in FILES or source.startswith((".", "~", os.sep)) or source.count("/") > 1:
        place = "there" if is_address(source) else f"in {path.absolute().parent}"
        raise FileNotFoundError(f"{without_secrets(source)}: no such file. Looked {place}")
    name = source.removesuffix("-bench") if source == "vicuna-bench" else source
    if name in _BENCHMARK_FILES:
        raise FileNotFoundError(
            f"{source} is a file of the GitHub repository prometheus-eval/prometheus-eval. Download "
            f"{_BENCHMARK_FILES[name]} from there, and give its path"
        )
    return _read_hub(BENCHMARKS.get(source, source))


def plain(value: Any) -> Any:
    """A cell as JSON has it: NaN as None, dates as text, decimals as numbers.

    Raises:
        TypeError: It holds something that JSON has no way of writing, such as bytes or an image.

    Example:
        >>> plain([float("nan"), Decimal("4.50"), datetime.date(2024, 5, 1)])
        [None, 4.5, '2024-05-01']
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if value == value else None
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if hasattr(value, "tolist"):  # of numpy
        return plain(value.tolist())
    raise TypeError(f"holds {type(value).__name__}")


def _integer(digits: str) -> int | str:
    """An integer of JSON; Python makes no number of thousands of digits, and a text is refused where one is needed."""
    return int(digits) if len(digits) < 1000 else digits


_DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)


def _record(value: Any, where: str) -> Record | ValueError:
    """A value as a record, or what is wrong with it."""
    if not isinstance(value, dict):
        return ValueError(f"{where} is {type(value).__name__} instead of an object")
    if isinstance(value, _Repeating):
        return ValueError(f"{where} has the key {value.name!r} twice. Remove one of the two")
    return value


def _packing(path: Path) -> str | None:
    with path.open("rb") as file:
        begins = file.read(4)
    return next((name for magic, name in _PACKINGS.items() if begins.startswith(magic)), None)


def _read_jsonl(path: Path) -> Iterator[Record | ValueError]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = _DECODER.decode(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
            except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
                yield ValueError(f"line {number} is not JSON ({error}). Each line must be one object")
                continue
            yield _record(record, f"line {number}")


def _read_json(path: Path) -> Iterator[Record | ValueError]:
    """The objects of a list, decoded one after the other."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_CHUNK).lstrip()
            if text[:1] != "[":
                kind = type(_DECODER.decode(text + file.read())).__name__
                raise _NotRowsError(
                    f"{path} holds a JSON {kind}. Write a list of objects, as df.to_json(path, orient='records') does"
                )
            at, number = 1, 0
            while True:
                at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
                if text[at : at + 1] == "]":
                    break
                try:
                    record, at = _DECODER.raw_decode(text, at)
                except ValueError:
                    more = file.read(max(_CHUNK, len(text)))
                    if not more:
                        raise
                    text, at = text[at:] + more, 0
                    continue
                if not isinstance(record, dict):
                    raise _NotRowsError(f"{path}, row {number}: {type(record).__name__} instead of an object")
                yield _record(record, f"row {number}")
                number += 1
    except _NotRowsError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON: {error}. If it is JSONL, with one object per line, rename it to .jsonl"
        ) from error


class _NotRowsError(ValueError):
    """A file is JSON, but no list of objects."""


def _read_csv(path: Path) -> Iterator[Record]:
    """Rows of a CSV file in UTF-8, its columns named in the first line; a cell of `_NOTHING` is None.

    The delimiter is the comma, semicolon or tab that parts the first line into most names. Between tabs, a quotation
    mark is a character like any other unless every cell that begins with one is quoted as a whole.
    """
    csv.field_size_limit(2**31 - 1)  # a response may be longer than the 128 KiB that Python allows a cell
    number = 0
    try:
        # `utf-8-sig`: spreadsheets put a mark before the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(file)
            quoted = delimiter != "\t" or _is_quoted(file)
            lines = csv.reader(
                file, delimiter=delimiter, strict=True, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            )
            first = next((cells for cells in lines if any(map(str.strip, cells))), [])
            names = _without_blanks([name.strip() for name in first], 0)
            # pandas leaves its index in the first columns, without a name.
            index = next((at for at, name in enumerate(names) if name), 0)
            if not all(names[index:]) or len(set(names[index:])) < len(names) - index:
                raise ValueError(
                    f"{path}: the first line must name every column exactly once. It names: "
                    f"{', '.join(repr(name) for name in names) or 'nothing'}"
                )
            for cells in lines:
                if not cells:
                    continue
                cells = _without_blanks(cells, len(names))
                if len(cells) != len(names):
                    raise ValueError(
                        f"{path}, line {lines.line_num}: {len(cells)} cells, but the first line names {len(names)} "
                        "columns. Put cells that contain the delimiter, a quote or a line break in quotes"
                    )
                number += 1
                columns = zip(names[index:], cells[index:], strict=True)
                yield {name: None if cell.strip() in _NOTHING else cell for name, cell in columns}
            if not names:
                raise ValueError(f"{path} is empty: it has only blank lines")
            if not number:
                raise ValueError(f"{path} has a header line with the columns {', '.join(names)}, but no rows")
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}. Save the file again as CSV") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Save it as 'CSV UTF-8'") from error


def _without_blanks(cells: list[str], kept: int) -> list[str]:
    """Cells without the blank ones at the end, as spreadsheets write them, behind the first `kept`."""
    while len(cells) > kept and not cells[-1].strip():
        cells = cells[:-1]
    return cells


def _delimiter(file: Any) -> str:
    """What parts the first line into most names, inside quotes left alone."""
    counts = {}
    for delimiter in _DELIMITERS:
        file.seek(0)
        try:
            counts[delimiter] = len(next(csv.reader(file, delimiter=delimiter, strict=True), []))
        except csv.Error:
            counts[delimiter] = 0
    file.seek(0)
    return max(counts, key=counts.__getitem__)


def _is_quoted(file: Any) -> bool:
    """Whether the cells between tabs that begin with a quotation mark are quoted as CSV's are."""
    file.seek(0)
    rows: Iterator[Sequence[str]] = (line.rstrip("\r\n").split("\t") for line in file if line.strip())
    width, quoted = len(next(rows, [])), True
    for cells in rows:
        if len(cells) != width:  # a line's end or a tab inside quotes, then; or a mistake, which the reader names
            break
        quoted = quoted and all(_QUOTED.fullmatch(cell) for cell in cells if cell.startswith('"'))
    file.seek(0)
    return quoted


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as opened, ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise ValueError(f"{path} has several columns called {twice[0]!r}. Rename all but one")
            as_json, labels = json_columns(file.schema_arrow), _labels(file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    own = {name: json.loads(row[name]) for name in as_json if row[name] is not None}
                    own |= {name: texts.get(row[name]) for name, texts in labels.items()}
                    yield row | own
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _labels(schema: Any) -> dict[str, dict[int, str]]:
    """Column -> the texts that its numbers stand for, as `datasets` writes categories."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (written.get("info") or {}).get("features") or {}
    return {
        name: dict(enumerate(feature["names"]))
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in schema.names
    }


def _read_hub(source: str) -> Iterable[Record]:
    from datasets import load_dataset

    from trl_tract.rows.golds import label_columns

    name, _, split = source.partition(":")
    try:
        dataset: Any = load_dataset(name, split=split or "train")
    except Exception as error:  # whatever kind the hub's client raises today, the user needs to know what was asked for
        reason = " ".join(str(error).split())
        advice = " To use a split other than train, add it after a colon, as in ID:test" if not split else ""
        raise FileNotFoundError(
            f"{source} is not a local file and could not be read as a hub dataset: {reason}.{advice}"
        ) from error
    # The texts that the numbers of categories stand for.
    labels = {name: dict(enumerate(dataset.features[name].names)) for name in label_columns(dataset)}
    if labels:
        return (row | {name: texts.get(row[name]) for name, texts in labels.items()} for row in dataset)
    return dataset  # type: ignore[no-any-return]
