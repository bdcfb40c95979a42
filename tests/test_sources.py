"""Files and hub ids become records, and what cannot be read is named by file and line."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from trl_tract.sources.files import read_records


def written(tmp_path, name, text, encoding="utf-8"):
    file = tmp_path / name
    file.write_bytes(text.encode(encoding))
    return str(file)


def test_csv_has_its_columns_from_the_first_line(tmp_path):
    file = written(tmp_path, "a.csv", 'question,stars\n"one, ""two""\nthree",4\n')
    assert list(read_records(file)) == [{"question": 'one, "two"\nthree', "stars": "4"}]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_csv_delimiters_are_told_by_the_first_line(tmp_path, name, delimiter):
    file = written(tmp_path, name, f"question{delimiter}stars\na, b{delimiter}4\n")
    assert list(read_records(file)) == [{"question": "a, b", "stars": "4"}]


def test_the_mark_that_spreadsheets_write_is_no_part_of_a_name(tmp_path):
    assert list(read_records(written(tmp_path, "a.csv", "stars,b\n4,x\n", "utf-8-sig"))) == [{"stars": "4", "b": "x"}]


def test_an_empty_cell_of_csv_is_none(tmp_path):
    assert list(read_records(written(tmp_path, "a.csv", "a,b\n , x \n"))) == [{"a": None, "b": " x "}]


def test_a_cell_of_csv_may_be_longer_than_python_allows_by_default(tmp_path):
    (record,) = read_records(written(tmp_path, "a.csv", "a,b\n" + "x" * 200_000 + ",1\n"))
    assert len(record["a"]) == 200_000


def test_parquet_has_its_own_types(tmp_path):
    parquet.write_table(pyarrow.table({"a": ["x", None], "score": [4.5, 2.0]}), tmp_path / "a.parquet")
    assert list(read_records(str(tmp_path / "a.parquet"))) == [{"a": "x", "score": 4.5}, {"a": None, "score": 2.0}]


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.csv", "", "is empty: it holds 0 bytes"),
        ("a.json", "", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.parquet", "", "is empty"),
        ("a.csv", "a,b\n", "a header line with the columns a, b, but no rows"),
        ("a.csv", "a,,b\n1,2,3\n", "It names: 'a', '', 'b'"),
        ("a.csv", "a,a\n1,2\n", "It names: 'a', 'a'"),
        ("a.csv", "a,b\n1,2\nx,y,z\n", "line 3: 3 cells, but the first line names 2 columns"),
        ("a.csv", 'a,b\n"x" y,2\n', "line 2: "),
        ("a.parquet", "no such thing", "cannot be read as Parquet"),
        ("a.json", "[1]", "row 0: int instead of an object"),
        ("a.json", '{"a": {"0": 1}}', "orient='records'"),
        ("a.jsonl", "\x1f\x8b\x08", "holds gzip data"),
        ("a.csv", "PK\x03\x04\x14", "holds zip or Excel data"),
        ("a.jsonl.gz", "x", "one uncompressed file"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_named(tmp_path, name, text, wanted):
    with pytest.raises(ValueError, match=wanted):
        list(read_records(written(tmp_path, name, text, "latin-1")))


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"a": 1, "a": 2}'), ("a.json", '[{"a": 1, "a": 2}]')])
def test_an_object_that_says_a_thing_twice_is_no_record(tmp_path, name, text):
    (record,) = read_records(written(tmp_path, name, text))
    assert isinstance(record, ValueError)


def test_parquet_with_a_column_twice_is_refused(tmp_path):
    column = pyarrow.array([4])
    parquet.write_table(pyarrow.Table.from_arrays([column, column], ["score", "score"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="'score'"):
        list(read_records(str(tmp_path / "a.parquet")))


def test_a_directory_is_called_one(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        read_records(str(tmp_path))


def test_csv_in_another_encoding_says_how_to_save_it(tmp_path):
    with pytest.raises(ValueError, match=r"UTF-8"):
        list(read_records(written(tmp_path, "a.csv", "a,b\ngrün,1\n", "latin-1")))


@pytest.mark.parametrize("source", ["nowhere.csv", "./nowhere", "a/b/c", "/nowhere/rows"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(source):
    with pytest.raises(FileNotFoundError, match=r"no such file"):
        read_records(source)


def test_a_hub_id_that_cannot_be_read_says_what_was_asked_for():
    with pytest.raises(FileNotFoundError, match=r"someone/rows"):
        read_records("someone/rows")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("someone/rows", ("someone/rows", "train")),
        ("someone/rows:test", ("someone/rows", "test")),
        ("feedback-bench", ("prometheus-eval/Feedback-Bench", "train")),
    ],
)
def test_a_hub_id_names_a_split_behind_a_colon(source, asked, monkeypatch):
    # There is no network here: what reaches the hub's client is what counts.
    seen = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: seen.append((name, split)) or [])
    read_records(source)
    assert seen == [asked]


@pytest.mark.parametrize("name", ["vicuna-bench", "mt-bench", "flask"])
def test_a_benchmark_that_is_no_hub_dataset_says_where_its_file_is(name):
    with pytest.raises(FileNotFoundError, match=r"Download eval/benchmark/data/\w+_eval.json from there"):
        read_records(name)


@pytest.mark.parametrize(
    ("name", "text", "records"),
    [
        ("a.csv", ",a,b\n0,x,1\n1,y,2\n", [{"a": "x", "b": "1"}, {"a": "y", "b": "2"}]),
        ("a.csv", '"a;b;c",d\nx,1\n', [{"a;b;c": "x", "d": "1"}]),
        ("a.csv", '"a\nb";c\nx;1\n', [{"a\nb": "x", "c": "1"}]),
        (
            "a.tsv",
            'a\tb\n"Great!" he said\t4\n"no\t2\nend"\t3\n',
            [('"Great!" he said', "4"), ('"no', "2"), ('end"', "3")],
        ),
        ("a.tsv", 'a\tb\n"a ""b"" c"\t4\n', [('a "b" c', "4")]),
        ("a.tsv", 'a\tb\n"two\nlines"\t4\n', [("two\nlines", "4")]),
        ("a.json", '\ufeff[{"a": 1}]', [{"a": 1}]),
        ("a.jsonl", '\ufeff{"a": 1}\n', [{"a": 1}]),
    ],
)
def test_files_of_spreadsheets_and_tables_are_read_as_they_were_meant(tmp_path, name, text, records):
    wanted = [each if isinstance(each, dict) else dict(zip("ab", each, strict=True)) for each in records]
    assert list(read_records(written(tmp_path, name, text))) == wanted


def test_a_line_of_tsv_with_another_number_of_cells_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 3: 3 cells"):
        list(read_records(written(tmp_path, "a.tsv", 'a\tb\n"x" y\t1\nx\ty\tz\n')))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_json_is_read_in_pieces_of_any_size(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr("trl_tract.sources.files._CHUNK", chunk)
    rows = [{"a": "x" * number, "b": [1, {"c": "},]"}]} for number in range(30)]
    assert list(read_records(written(tmp_path, "a.json", json.dumps(rows, indent=1)))) == rows


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1}, {"b"'])
def test_json_that_is_cut_is_no_json(tmp_path, text):
    with pytest.raises(ValueError, match="is not JSON"):
        list(read_records(written(tmp_path, "a.json", text)))


@pytest.mark.parametrize(
    "text",
    [
        "prompt,score,\np,4,\n",
        "prompt,score\np,4,,\n",
        ",,prompt,score\n0,0,p,4\n",
        "\n , \nprompt,score\np,4\n",
    ],
)
def test_cells_without_a_name_are_left_alone(tmp_path, text):
    assert list(read_records(written(tmp_path, "a.CSV", text))) == [{"prompt": "p", "score": "4"}]


@pytest.mark.parametrize("text", ["prompt,score\np,4,5\n", "prompt,,score\np,4,5\n", "prompt,score,score\np,4,5\n"])
def test_a_cell_that_holds_something_has_to_have_a_name(tmp_path, text):
    with pytest.raises(ValueError, match=r"a\.csv"):
        list(read_records(written(tmp_path, "a.csv", text)))


def test_a_mapping_of_parquet_is_a_mapping(tmp_path):
    scores = pyarrow.array([[("tone", 4.0), ("facts", 1.0)]], pyarrow.map_(pyarrow.string(), pyarrow.float64()))
    parquet.write_table(pyarrow.table({"scores": scores}), tmp_path / "a.parquet")
    assert list(read_records(str(tmp_path / "a.parquet"))) == [{"scores": {"tone": 4.0, "facts": 1.0}}]
