"""Files and hub datasets -> records, one mapping of columns a row. Knows nothing of judging, tokens or models."""

import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_tract.files.journal import read_jsonl

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


def read_records(source: str) -> Iterable[Mapping[str, Any]]:
    """The records of a file, or of a hub dataset.

    Args:
        source: A file (`.jsonl`; `.json` with a list of objects; `.csv` or `.tsv` with a header; `.parquet`), one of
            `BENCHMARKS`, or a hub id. `ID:SPLIT` is a split other than `train`.

    Raises:
        FileNotFoundError: No such file, or no such dataset.
        ValueError: The file is of another kind, or a part of it cannot be read; the line is named.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix == ".jsonl":
            return read_jsonl(path)
        if path.suffix == ".json":
            return _read_json(path)
        if path.suffix in (".csv", ".tsv"):
            return _read_csv(path)
        if path.suffix == ".parquet":
            return _read_parquet(path)
    if path.exists():
        raise ValueError(f"{source} is no file that is read here: give one of {', '.join(FILES)}, or a hub id")
    if path.suffix in FILES or source.startswith((".", "~", os.sep)) or source.count("/") > 1:
        raise FileNotFoundError(f"{source}: no such file. It was looked for in {path.absolute().parent}")
    name = source.removesuffix("-bench") if source == "vicuna-bench" else source
    if name in _BENCHMARK_FILES:
        raise FileNotFoundError(
            f"{source} is a file of the repository prometheus-eval/prometheus-eval: get {_BENCHMARK_FILES[name]} "
            "there, and give its path here"
        )
    return _read_hub(BENCHMARKS.get(source, source))


def _read_json(path: Path) -> list[Mapping[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. One object a line is JSONL: name it .jsonl") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a JSON {type(records).__name__}; a list of objects is needed")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, row {number}: {type(record).__name__} instead of an object")
    return records


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV file in UTF-8, its columns named in the first line; an empty cell is None.

    The delimiter is the comma, semicolon or tab that the first line has most of.
    """
    csv.field_size_limit(2**31 - 1)  # a response may be longer than the 128 KiB that Python allows a cell
    try:
        # `utf-8-sig`: spreadsheets put a mark before the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = "\t" if path.suffix == ".tsv" else max(_DELIMITERS, key=first.count)
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            names = [name.strip() for name in next(lines, [])]
            if not names or not all(names) or len(set(names)) < len(names):
                raise ValueError(
                    f"{path}: the first line has to name every column, each once. It names: "
                    f"{', '.join(repr(name) for name in names) or 'nothing'}"
                )
            for cells in lines:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise ValueError(
                        f"{path}, line {lines.line_num}: {len(cells)} cells, but the first line names {len(names)} "
                        "columns. A cell that holds the delimiter, a quote or a line end has to stand in quotes"
                    )
                yield {name: cell if cell.strip() else None for name, cell in zip(names, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}. Write the file again as CSV") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Save it as 'CSV UTF-8'") from error


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _read_hub(source: str) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        return load_dataset(name, split=split or "train")  # type: ignore[no-any-return]
    except Exception as error:  # whatever kind the hub's client raises today, the user needs to know what was asked for
        reason = " ".join(str(error).split())
        advice = " A split other than train is named behind a colon, as in ID:test" if not split else ""
        raise FileNotFoundError(
            f"{source} is no file here, and could not be read as a hub dataset: {reason}.{advice}"
        ) from error


def first_record(source: str) -> Mapping[str, Any] | None:
    """The first record, or None if there is none."""
    return next(itertools.islice(iter(read_records(source)), 1), None)
