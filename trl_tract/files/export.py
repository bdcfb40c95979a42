"""The rows of a JSONL file, brought elsewhere as JSONL or Parquet. Every value comes back as it was.

A column of a Parquet file has the type that all of its values have. Where they have none in common, or objects of
different keys, its cells are JSON; `rows.json_columns` in the file's metadata names such columns.
"""

import json
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from trl_tract.files.addresses import Address, deliver
from trl_tract.files.journal import is_address, read_jsonl

_JSON_COLUMNS = b"rows.json_columns"
_BATCH = 1024  # rows
_MIXED = "json"
Kind = Any
"""`null`, `bool`, `int64`, `double`, `string`; a list with the kind of its items; a dict with those of its values."""


def check_target(target: str) -> None:
    """Look whether rows can be brought there, before there are any.

    Raises:
        ValueError: It is named otherwise than `.jsonl` or `.parquet`, or fsspec knows no such address.
        ImportError: fsspec needs a package for it.
    """
    if Path(target).suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--export {target}: the name must end with .jsonl or .parquet")
    if is_address(target):
        Address(target)


def export(rows: Path, target: str) -> None:
    """Bring the rows of a JSONL file to a path or an address, as its name says."""
    if Path(target).suffix == ".jsonl":
        deliver(rows, target)
        return
    with tempfile.TemporaryDirectory(prefix="trl-tract-") as folder:
        file = Path(folder) / "rows.parquet"
        _write_parquet(rows, file)
        deliver(file, target)


def json_columns(schema: Any) -> list[str]:
    """The columns of a Parquet file's Arrow schema whose cells are JSON."""
    return list(json.loads((schema.metadata or {}).get(_JSON_COLUMNS, b"[]")))


def _write_parquet(rows: Path, file: Path) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    kinds: dict[str, Kind] = {}
    for row in read_jsonl(rows):
        for name, value in row.items():
            kinds[name] = _common(kinds.get(name, "null"), _kind(value))
    as_json = [name for name, kind in kinds.items() if kind == _MIXED]
    fields = [(name, _arrow(pyarrow, "string" if name in as_json else kind)) for name, kind in kinds.items()]
    schema = pyarrow.schema(fields, metadata={_JSON_COLUMNS: json.dumps(as_json)})
    with ParquetWriter(file, schema) as writer:
        left = read_jsonl(rows)
        while batch := list(islice(left, _BATCH)):
            for row in batch:
                row |= {name: json.dumps(row[name]) for name in as_json if row.get(name) is not None}
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))


def _kind(value: Any) -> Kind:
    if isinstance(value, list):
        kind: Kind = "null"
        for each in value:
            kind = _common(kind, _kind(each))
        return _MIXED if kind == _MIXED else [kind]
    if isinstance(value, Mapping):
        fields = {name: _kind(each) for name, each in value.items()}
        return _MIXED if not fields or _MIXED in fields.values() else fields
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**53:
        return _MIXED  # as a float it would be another number
    if isinstance(value, str) and not value.isascii() and value != value.encode(errors="replace").decode():
        return _MIXED  # half of a pair of surrogates is no UTF-8
    names = {type(None): "null", bool: "bool", int: "int64", float: "double", str: "string"}
    return names[type(value)]


def _common(one: Kind, other: Kind) -> Kind:
    """The kind that values of two kinds have in common, or `json`."""
    if one == other or "null" in (one, other):
        return other if one == "null" else one
    if _MIXED in (one, other):
        return _MIXED
    if isinstance(one, list) and isinstance(other, list):
        kind = _common(one[0], other[0])
        return _MIXED if kind == _MIXED else [kind]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        fields = {name: _common(one[name], other[name]) for name in one}
        return _MIXED if _MIXED in fields.values() else fields
    return "double" if [one, other] in (["int64", "double"], ["double", "int64"]) else _MIXED


def _arrow(pyarrow: Any, kind: Kind) -> Any:
    if isinstance(kind, list):
        return pyarrow.list_(_arrow(pyarrow, kind[0]))
    if isinstance(kind, dict):
        return pyarrow.struct([(name, _arrow(pyarrow, each)) for name, each in kind.items()])
    types = {"null": pyarrow.null, "bool": pyarrow.bool_, "int64": pyarrow.int64, "double": pyarrow.float64}
    return types.get(kind, pyarrow.string)()
