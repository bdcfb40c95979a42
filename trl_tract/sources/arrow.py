"""A JSONL file of rows -> a dataset that is read from disk, whatever its first row looks like. Knows no models."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value
from datasets.arrow_writer import ArrowWriter

from trl_tract.files.journal import read_jsonl
from trl_tract.rows.golds import read_golds
from trl_tract.rows.rendering import as_prompt_completion
from trl_tract.rows.row import ROW_NUMBER, Row
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.sources.door import number_file
from trl_tract.sources.schemas import TOKENS


def training_dataset(path: Path, scales: Sequence[Scale], folder: Path, *, reuse: bool = False) -> Dataset:
    """The columns that training reads of a JSONL file of rows, memory-mapped.

    Every row keeps its own: the types of the columns are fixed beforehand, and columns that nobody uses are left out.

    Args:
        path: Rows as `door.write_rows` writes them.
        scales: Whose gold scores are read.
        folder: Receives the Arrow file, and what is made of it.
        reuse: Whether another process of this machine has just written it.

    Raises:
        ValueError: A row's gold score cannot be read; the row is named.
    """
    file = folder / f"{path.stem}.arrow"
    if reuse and file.exists():
        return Dataset.from_file(str(file))
    first = next(read_jsonl(path), {})
    features = _tokenised(first) if "input_ids" in first else _text(scales)
    beside = number_file(path)
    numbers = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else None
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with ArrowWriter(path=str(partial), features=features) as writer:
        for place, row in enumerate(read_jsonl(path)):
            number = place if numbers is None else numbers[place]
            try:
                cells = row if "input_ids" in features else _cells(row, scales)
            except ScoreNotFoundError as error:
                raise ValueError(f"{path.name}, row {number}: {error}") from error
            writer.write({name: number if name == ROW_NUMBER else cells.get(name) for name in features})
        writer.finalize()
    os.replace(partial, file)
    return Dataset.from_file(str(file))


def _text(scales: Sequence[Scale]) -> Features:
    several = {"scores": {scale.name: List(Value("float64")) for scale in scales}}
    return Features(
        {
            "prompt": Json(),
            "completion": Json(),
            **(several if scales[0].name else {"score": List(Value("float64"))}),
            "tools": Value("string"),
            "chat_template_kwargs": Json(),
            "prompt_is_text": Value("bool"),
            "rationale_source": Value("string"),
            ROW_NUMBER: Value("int64"),
        }
    )


def _tokenised(first: Row) -> Features:
    columns = [name for name in first if name in TOKENS or name.startswith("annotators_")]
    kinds = {"input_ids": "int64", "labels": "int64"}
    return Features({name: List(Value(kinds.get(name, "float64"))) for name in columns} | {ROW_NUMBER: Value("int64")})


def _cells(row: Row, scales: Sequence[Scale]) -> dict[str, Any]:
    row = as_prompt_completion(row)
    golds = read_golds(row, scales)
    cells = {name: row.get(name) for name in ("tools", "prompt_is_text", "rationale_source")}
    if cells["tools"] is not None and not isinstance(cells["tools"], str):
        cells["tools"] = json.dumps(cells["tools"])
    # `Json` takes text that is JSON as it stands: a prompt of "12" would come back as a number.
    cells |= {
        name: None if row.get(name) is None else json.dumps(row[name])
        for name in ("prompt", "completion", "chat_template_kwargs")
    }
    if golds is None:
        return cells
    if scales[0].name:
        return cells | {"scores": {scale.name: each for scale, each in zip(scales, golds, strict=True)}}
    return cells | {"score": golds[0]}
