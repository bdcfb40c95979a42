"""Rows that come from addresses, results that go to them, and Parquet that loses nothing."""

import json
from itertools import zip_longest
from pathlib import Path

import fsspec
import pytest
from conftest import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_survival import save_model

from trl_tract.cli import main
from trl_tract.files.export import check_target, export
from trl_tract.files.journal import guard, read_jsonl, write_jsonl
from trl_tract.sources.files import read_records

ROWS = [{"prompt": f"1900-01-0{i}, é", "score": i} for i in range(1, 4)]


@pytest.fixture
def memory():
    """An object store of this process."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.mark.parametrize("place", ["memory://bucket/deep", "file://{folder}/deep", "{folder}/deep"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_result_that_was_brought_to_an_address_is_read_from_there_as_it_was(memory, tmp_path, place, kind):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    target = f"{place.format(folder=tmp_path)}/rows.{kind}"
    export(tmp_path / "rows.jsonl", target)
    assert list(read_records(target)) == ROWS


@pytest.mark.parametrize(("command", "result"), [("judge", "judgements.jsonl"), ("distill", "rows.jsonl")])
def test_a_command_reads_at_one_address_and_brings_its_result_to_another(memory, tmp_path, command, result):
    model = save_model(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", make_rows(2))
    export(tmp_path / "rows.jsonl", "memory://bucket/rows.parquet")
    given = ["--model", model, "--data", "memory://bucket/rows.parquet", "--output_dir", str(tmp_path / "out")]
    given += ["--max_new_tokens", "4", "--max_attempts", "1", "--export", "memory://bucket/result.jsonl"]
    assert main([command, *given]) == 0
    assert memory.cat_file("/bucket/result.jsonl") == (tmp_path / "out" / result).read_bytes()


@pytest.mark.parametrize(("name", "text"), [("rows.csv", "prompt,score\na,1\n"), ("rows.json", '[{"prompt": "a"}]')])
def test_text_files_are_read_from_addresses(memory, name, text):
    memory.pipe_file(f"/bucket/{name}", text.encode())
    assert next(iter(read_records(f"memory://bucket/{name}")))["prompt"] == "a"


def test_a_file_that_is_not_at_its_address_is_no_hub_id(memory):
    with pytest.raises(FileNotFoundError):
        read_records("memory://bucket/rows.jsonl")


def test_what_arrives_cut_is_an_error(memory, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(type(memory), "put_file", lambda self, one, other: self.pipe_file(other, b"{}"))
    with pytest.raises(OSError, match="2 of"):
        export(tmp_path / "rows.jsonl", "memory://bucket/rows.jsonl")


@pytest.mark.parametrize(
    ("target", "kind"),
    [("rows.csv", ValueError), ("nowhere://bucket/rows.jsonl", ValueError), ("gs://bucket/rows.jsonl", ImportError)],
)
def test_a_target_that_cannot_be_is_refused_before_there_are_rows(target, kind):
    with pytest.raises(kind, match=target.split("/")[0]):
        check_target(target)


@pytest.mark.parametrize("address", ["s3://bucket/out", "file:///tmp/out"])
def test_blocks_are_not_kept_at_an_address(address):
    with pytest.raises(ValueError, match="address"):
        guard(Path(address), {}, "judging")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=4,
)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.sampled_from(["a", "b"]), values), min_size=1, max_size=4))
def test_parquet_gives_every_value_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "rows.jsonl", rows)
    export(folder / "rows.jsonl", str(folder / "rows.parquet"))
    names = {name for row in rows for name in row}
    whole = [{name: row.get(name) for name in names} for row in read_jsonl(folder / "rows.jsonl")]
    for got, row in zip_longest(read_records(str(folder / "rows.parquet")) if names else whole, whole):
        # Of equal numbers one may be written 1.0 and the other 1.
        assert got == row
        assert json.dumps(got, sort_keys=True).count("true") == json.dumps(row, sort_keys=True).count("true")
