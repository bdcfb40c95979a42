"""The same rows give the same golds, refusals, counts and row numbers, however they come in and whoever reads them."""

import csv
import datetime
import json
import math
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from conftest import make_rows, make_tokenizer, make_trainer, save_seed
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from trl_tract import CoTRAILJudge
from trl_tract.backends import ScriptedBackend
from trl_tract.cli import main
from trl_tract.files.journal import read_jsonl
from trl_tract.rows.dataset import check_dataset
from trl_tract.rows.refusals import Refusal
from trl_tract.rows.row import REFUSED
from trl_tract.rows.template import Template
from trl_tract.rows.tokens import asked_ids, prompt_ids
from trl_tract.scale.scale import read_scales
from trl_tract.sources.arrow import training_dataset
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.door import Source, write_rows
from trl_tract.sources.rubric import Rubric

SCALES = read_scales({})
FORMATS = ["jsonl", "json", "csv", "tsv", "parquet"]
in_every_format = pytest.mark.parametrize("kind", FORMATS)
COMPLETION = "Short. [RESULT] 5"
TABLE = [
    ({"score": 4}, 4.0),
    ({"score": 3.4}, 3.4),
    ({"score": "4"}, 4.0),
    ({"score": [4, 3, 3]}, 10 / 3),
    ({"score": [4, None]}, 4.0),
    ({"score": None}, 5.0),
    ({"score": ""}, 5.0),
    ({"score": math.nan}, 5.0),
    ({}, 5.0),
    ({"score": "n/a"}, "not a number"),
    ({"score": "4,5"}, "not a number"),
    ({"score": True}, "not a number"),
    ({"score": [True, 5]}, "not a number"),
    ({"score": []}, "no score"),
    ({"score": 9}, "off the range"),
    ({"score": 10**400}, "not a number"),
    ({"score": 2, "completion": None}, 2.0),
    ({"score": 2, "completion": math.nan}, 2.0),
    ({"completion": "Short. 5"}, "no marker"),
    ({"completion": None}, "no score"),
    ({"prompt": None}, "no prompt"),
    ({"prompt": math.nan}, "no prompt"),
    ({"tools": "[{"}, "unreadable"),
]
"""What differs from a good row, and its gold score or the kind of its refusal."""
TRAINED = [wanted for change, wanted in TABLE if isinstance(wanted, float) and "completion" not in change]
REFUSALS = {number: wanted for number, (_, wanted) in enumerate(TABLE) if isinstance(wanted, str)}


def rows_of(changes):
    rows = [{"prompt": f"Judge answer {number}.", "completion": COMPLETION} for number in range(len(changes))]
    return [row | change for row, change in zip(rows, changes, strict=True)]


def cell(value):
    """As CSV has it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, str) else json.dumps(value)


def written(folder: Path, kind: str, rows) -> str:
    file = folder / f"rows.{kind}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "parquet":
        columns = {name: [cell(row.get(name)) for row in rows] for name in names}
        parquet.write_table(
            pyarrow.table({name: pyarrow.array(cells, "string") for name, cells in columns.items()}), file
        )
    else:
        with file.open("w", newline="") as out:
            table = csv.writer(out, delimiter="\t" if kind == "tsv" else ",")
            table.writerow(names)
            table.writerows([cell(row.get(name)) for name in names] for row in rows)
    return str(file)


def outcome(source: str, *, scales=SCALES):
    """Of each record its mean gold score, None without one, or the kind of its refusal."""
    found = [
        item if isinstance(item, Refusal) else item.reference.get("score") for _, item in Source(source, scales).found()
    ]
    return [
        each.kind if isinstance(each, Refusal) else sum(each) / len(each) if isinstance(each, list) else each
        for each in found
    ]


@in_every_format
def test_the_scores_of_several_people_stay_apart_for_the_report(kind, tmp_path):
    rows = rows_of([{"score": [4, 3, 3]}, {"score": [5, None]}])
    assert [item.reference["score"] for _, item in Source(written(tmp_path, kind, rows), SCALES).items()] == [
        [4, 3, 3],
        5,
    ]


@in_every_format
def test_what_is_judged_keeps_its_gold_scores(kind, tmp_path):
    rows = rows_of([{}, {"score": 3.4}, {"score": [4, 3]}, {"score": None}])
    judged = Source(written(tmp_path, kind, rows), SCALES).judged_rows(chat=False)
    assert [row["score"] for _, row in judged] == [5, 3.4, [4, 3], 5]


@in_every_format
def test_scores_in_words_are_judged_as_their_values(kind, tmp_path):
    rows = rows_of([{"completion": "Short. [RESULT] good"}, {"score": "poor", "completion": "Short. [RESULT] poor"}])
    scales = read_scales({"score_values": [1, 2], "score_texts": ["poor", "good"]})
    judged = Source(written(tmp_path, kind, rows), scales).judged_rows(chat=False)
    assert [row["score"] for _, row in judged] == [2, 1]


@in_every_format
def test_without_rationales_a_row_is_trained_on_its_gold_score_alone(kind, tmp_path):
    rows = rows_of([{"score": [4, 3, 3]}, {"score": 2, "completion": math.nan}, {}])
    source = Source(written(tmp_path, kind, rows), SCALES, bare="all")
    found = [(row["completion"], row["score"]) for _, row in source.training_rows(chat=False)]
    assert found == [("[RESULT] 3", [4, 3, 3]), ("[RESULT] 2", 2), ("[RESULT] 5", 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_seed(tmp_path_factory.mktemp("model"), weights=False)


@pytest.mark.parametrize("nothing", ["NA", "NULL", "null", "\\N", "#N/A", " NA "])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_cells_without_a_value_are_missing_however_they_are_written(kind, nothing, tmp_path):
    row = {"instruction": "ask", "response": "fine", "rationale": nothing, "score": 4, "group": nothing}
    file = written(tmp_path, kind, [row, row | {"rationale": "good", "score": nothing}])
    own = OwnColumns({}, Rubric("Polite?", {str(score): "so" for score in range(1, 6)}))
    (_, first), (_, second) = Source(file, SCALES, own).found()
    assert (first.training, first.group, second.kind) == ((), "ask", "empty column")
    (_, first), (_, second) = Source(file, SCALES, own).found(judged=True)
    assert (first.reference["score"], "score" in second.reference) == (4.0, False)


@pytest.mark.parametrize("how", [json.dumps, str])
@pytest.mark.parametrize("name", ["prompt", "completion"])
def test_messages_that_a_table_made_text_of_are_refused(name, how, tmp_path):
    row = {"prompt": "Judge.", "completion": "Fine. [RESULT] 4"}
    spelled = how([{"role": "user", "content": "Fine. [RESULT] 4"}])
    ((_, refused),) = Source(written(tmp_path, "csv", [row | {name: spelled}]), SCALES).found()
    assert refused.kind == "not text"


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_pairs_that_a_table_made_text_of_are_refused(name, tmp_path):
    row = {"prompt": "ask", "chosen": "good", "rejected": "bad", name: '[{"content": "good", "role": "assistant"}]'}
    own = OwnColumns({}, Rubric("Polite?", {str(score): "so" for score in range(1, 6)}))
    ((_, refused),) = Source(written(tmp_path, "csv", [row]), SCALES, own).found(judged=True)
    assert refused.kind == "pair"


@pytest.mark.parametrize("score", ["1", "2.0", "4.5"])
def test_numbers_as_text_that_may_be_a_score_or_its_value_are_refused(score, tmp_path):
    scales = read_scales({"score_values": {str(text): 6 - text for text in range(1, 6)}})
    rows = rows_of([{"score": score}, {"score": float(score)}, {}])
    assert outcome(written(tmp_path, "jsonl", rows), scales=scales) == ["ambiguous", float(score), 1.0]


def test_categories_are_the_texts_that_their_numbers_stand_for(tmp_path, monkeypatch):
    features = Features({"prompt": Value("string"), "score": ClassLabel(names=["1", "2", "3", "4", "5"])})
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "score": [0, 3, None]}, features=features)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: rows)
    for source in (str(tmp_path / "rows.parquet"), "someone/rows"):
        assert outcome(source) == [1.0, 4.0, "no score"]
    with pytest.raises(ValueError, match="add_column"):
        check_dataset(rows, "train")


@in_every_format
def test_the_table_holds_in_every_format(kind, tmp_path):
    found = outcome(written(tmp_path, kind, rows_of([change for change, _ in TABLE])))
    assert found == [pytest.approx(wanted) if isinstance(wanted, float) else wanted for _, wanted in TABLE]


def test_a_hub_dataset_is_read_as_a_file_is(tmp_path, monkeypatch):
    file = written(tmp_path, "parquet", rows_of([change for change, _ in TABLE]))
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, split: Dataset.from_parquet(file, cache_dir=str(tmp_path))
    )
    assert outcome("someone/rows") == outcome(file)


@in_every_format
def test_what_is_dropped_is_counted_and_named_by_its_row(kind, tmp_path):
    said = []
    source = Source(
        written(tmp_path, kind, rows_of([change for change, _ in TABLE])), SCALES, None, "drop", said.append
    )
    numbers = [number for number, _ in source.training_rows(chat=False)]
    assert numbers == [
        n for n, (change, wanted) in enumerate(TABLE) if isinstance(wanted, float) and "completion" not in change
    ]
    dropped, without = said
    for refused in set(REFUSALS.values()):
        of_kind = [number for number, each in REFUSALS.items() if each == refused]
        assert (
            f"{len(of_kind)} of {len(TABLE)} rows.{kind} rows refused ({refused}; first: row {of_kind[0]})" in dropped
        )
    assert without.startswith("2 rows of")


@in_every_format
def test_a_refused_row_ends_the_reading_after_all_are_counted(kind, tmp_path):
    file = written(tmp_path, kind, rows_of([{"score": 4}, {"score": "n/a"}, {"score": 3}, {"score": "n/a"}]))
    with pytest.raises(ValueError, match=rf"2 of 4 rows.{kind} rows refused \(not a number; first: row 1\)"):
        list(Source(file, SCALES).items())


@pytest.mark.parametrize("command", ["check", "train", "run"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_commands_count_alike(kind, command, tmp_path, model, capsys):
    rows = rows_of([change for change, _ in TABLE])
    file = written(tmp_path, kind, rows)
    options = [] if command == "check" else ["--dry-run", "--output_dir", str(tmp_path / "out"), "--bf16", "false"]
    named = "--model" if command == "check" else "--model_name_or_path"
    if command == "run":
        options += ["--eval_data", written(tmp_path, "json", rows_of([{"score": 4}]))]
    assert main([command, "--data", file, named, model, *options]) == 1
    printed = capsys.readouterr().out
    for refused in set(REFUSALS.values()):
        of_kind = [number for number, each in REFUSALS.items() if each == refused]
        assert f"rows refused ({refused}; first: row {of_kind[0]})" in printed
    # Rows with only a score are written for in a run, and left out of a single stage.
    count = len(TRAINED) if command == "train" else len(TABLE) - len(REFUSALS)
    if command == "check":
        assert f"{count} of {count + len(REFUSALS)} rows can be used for training" in printed
    else:
        assert f"{count} rows to train on" in printed
        assert main([command, "--data", file, named, model, *options, "--invalid_rows", "drop"]) == 0


def test_a_dry_run_holds_out_of_what_is_left(tmp_path, model, capsys):
    file = written(tmp_path, "jsonl", rows_of([{"score": 4}] * 19 + [{"score": "n/a"}]))
    options = ["--output_dir", str(tmp_path / "out"), "--bf16", "false", "--invalid_rows", "drop", "--dry-run"]
    assert main(["run", "--data", file, "--model_name_or_path", model, *options]) == 0
    assert "14 rows to train on, 5 held-out items" in capsys.readouterr().out


@in_every_format
def test_training_reads_the_same_golds_from_disk(kind, tmp_path):
    file = written(tmp_path, kind, rows_of([change for change, _ in TABLE]))
    write_rows(tmp_path / "train.jsonl", Source(file, SCALES, None, "drop", lambda _: None).training_rows(chat=False))
    dataset = training_dataset(tmp_path / "train.jsonl", SCALES, tmp_path / "arrow")
    assert [sum(scores) / len(scores) for scores in dataset["score"]] == pytest.approx(TRAINED)
    assert [TABLE[number][1] for number in dataset["__row__"]] == pytest.approx(TRAINED)
    assert dataset.cache_files


def test_training_in_python_reads_the_same_golds(tmp_path):
    readable = [change for change, wanted in TABLE if isinstance(wanted, float) and "completion" not in change]
    rows = [row | {"score": cell(row.get("score"))} for row in rows_of(readable)]
    trained = make_trainer(tmp_path, rows).train_dataset
    assert [max(score for score in row["score_labels"] if score == score) for row in trained] == pytest.approx(TRAINED)


cells = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.sampled_from(["4", "3.5", "4,5", "n/a", "", "nan", "[4, 3]", "five", "1e1", "[1, true]", "[]", "{}"]),
    st.lists(st.one_of(st.integers(0, 6), st.none(), st.booleans()), max_size=3),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores=st.lists(cells, min_size=1, max_size=6), completed=st.lists(st.booleans(), min_size=6, max_size=6))
def test_types_and_missing_values_mean_the_same_in_every_format(scores, completed, tmp_path):
    changes = [
        {"score": score} | ({} if here else {"completion": None})
        for score, here in zip(scores, completed, strict=False)
    ]
    rows = rows_of(changes)
    first, *others = (outcome(written(tmp_path, kind, rows)) for kind in FORMATS)
    assert others == [first] * len(others)


@pytest.mark.parametrize("name", ["score", "tools", "chat_template_kwargs", "group"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_rows_own_columns_count_whichever_row_comes_first(name, at, tmp_path):
    value = {"score": 3.4, "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}, "group": "g"}[name]
    rows = rows_of([{}, {}, {}])
    rows[at][name] = value
    file = written(tmp_path, "jsonl", rows)
    write_rows(tmp_path / "train.jsonl", Source(file, SCALES).training_rows(chat=False))
    assert [row.get(name) for row in read_jsonl(tmp_path / "train.jsonl")] == [row.get(name) for row in rows]
    row = training_dataset(tmp_path / "train.jsonl", SCALES, tmp_path / "arrow")[at]
    kept = {"score": [3.4], "tools": json.dumps(value), "chat_template_kwargs": value, "group": None}[name]
    assert row.get(name) == kept


def test_columns_that_nobody_uses_may_be_of_any_type(tmp_path):
    rows = rows_of([{"meta": 1, "x": "a"}, {"meta": [1, "b"], "x": {"k": 1}}, {"meta": {"a": None}}])
    file = written(tmp_path, "jsonl", rows)
    half = written(tmp_path, "json", rows_of([{"meta": "half \ud83d"}]))
    assert [type(item).__name__ for _, item in Source(half, SCALES).found()] == ["Item"]
    write_rows(tmp_path / "train.jsonl", Source(file, SCALES).training_rows(chat=False))
    assert list(read_jsonl(tmp_path / "train.jsonl")) == rows
    assert len(training_dataset(tmp_path / "train.jsonl", SCALES, tmp_path / "arrow")) == 3


@pytest.mark.parametrize("text", ["12", '"quoted"', "null", "[]", "{}", " é \u2028 😀", "\x00"])
def test_text_comes_back_from_disk_as_it_was(text, tmp_path):
    rows = rows_of([{"prompt": text}, {"prompt": [{"role": "user", "content": text}]}])
    rows[1]["completion"] = [{"role": "assistant", "content": COMPLETION}]
    write_rows(tmp_path / "train.jsonl", enumerate(rows))
    dataset = training_dataset(tmp_path / "train.jsonl", SCALES, tmp_path / "arrow")
    assert [(row["prompt"], row["completion"]) for row in dataset] == [
        (row["prompt"], row["completion"]) for row in rows
    ]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (datetime.datetime(2024, 5, 1, 12), "2024-05-01T12:00:00"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (Decimal("4.50"), 4.5),
        (b"bytes", None),
    ],
)
def test_what_json_cannot_hold_travels_as_text_or_is_left_out(value, wanted, tmp_path):
    table = {"prompt": ["p"], "completion": [COMPLETION], "when": [value]}
    parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    (row,) = (row for _, row in Source(str(tmp_path / "rows.parquet"), SCALES).training_rows(chat=False))
    assert row.get("when") == wanted
    json.dumps(row)


def test_bytes_in_a_column_that_is_needed_are_refused(tmp_path):
    table = {"prompt": [b"p"], "completion": [COMPLETION]}
    parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    assert outcome(str(tmp_path / "rows.parquet")) == ["unreadable"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"prompt": "half \ud83d"}, "no Unicode"),
        ({"completion": "half \ud83d [RESULT] 4"}, "no Unicode"),
        ({"prompt": 17}, "not text"),
        ({"prompt": []}, "not text"),
        ({"prompt": ["a"]}, "not text"),
        ({"completion": 4}, "not text"),
        ({"completion": [{"role": "assistant", "content": COMPLETION}]}, "mixed types"),
        ({"tools": {"a": 1}}, "unreadable"),
        ({"chat_template_kwargs": [1]}, "unreadable"),
        ({"prompt": None, "messages": [{"content": "x"}]}, "not understood"),
        ({"prompt": None, "messages": []}, "no completion"),
    ],
)
def test_one_odd_row_is_refused_and_the_others_are_read(change, kind, tmp_path):
    file = written(tmp_path, "jsonl", rows_of([{}, change, {}]))
    assert outcome(file) == [5.0, kind, 5.0]


def test_a_line_that_is_not_json_is_that_rows_fault(tmp_path):
    good = json.dumps(rows_of([{}])[0])
    (tmp_path / "rows.jsonl").write_text(f'{good}\n{{"prompt": "cut\n[1]\n{good}\n')
    assert outcome(str(tmp_path / "rows.jsonl")) == [5.0, "not JSON", "not JSON", 5.0]


def test_what_a_judge_cannot_read_is_that_items_error(tmp_path):
    file = written(tmp_path, "jsonl", rows_of([{"score": 4}, {"score": 9}, {"completion": None}, {"prompt": 17}]))
    rows = [row for _, row in Source(file, SCALES).judged_rows(chat=False)]
    assert [row.get("score") for row in rows] == [4.0, None, None, None]
    assert [number for number, row in enumerate(rows) if REFUSED in row] == [1, 3]
    assert rows[1][REFUSED].startswith("row 1: the score 9 is not between 1 and 5")


def test_a_pair_that_cannot_be_read_leaves_the_others_in_turn(tmp_path):
    pairs = [{"prompt": "ask", "chosen": "a", "rejected": "b"}] * 2
    file = written(tmp_path, "jsonl", pairs)
    sides = [row["side"] for _, row in Source(file, SCALES).judged_rows(chat=False)]
    assert sides == ["chosen", "rejected"] * 2


def test_missing_text_is_missing_not_nan(tmp_path):
    rows = rows_of([{"group": math.nan}, {"group": math.nan}])
    groups = {item.group for _, item in Source(written(tmp_path, "jsonl", rows), SCALES).items()}
    assert len(groups) == 2


@in_every_format
def test_the_text_nan_is_missing_too(kind, tmp_path):
    # As pandas writes it into text.
    rows = rows_of([{"prompt": "nan"}, {"completion": "NaN", "score": 4}])
    refused, judged = (item for _, item in Source(written(tmp_path, kind, rows), SCALES).found())
    assert refused.kind == "no prompt"
    assert judged.training == ()


def test_a_prompt_that_is_made_of_judged_texts_spells_no_control_token(tmp_path):
    record = {"instruction": "ask", "response": "no<|im_end|>", "rationale": "rude", "score": 1}
    rubric = Rubric("Polite?", {str(score): "so" for score in range(1, 6)})
    (tmp_path / "rows.jsonl").write_text(json.dumps(record))
    source = Source(str(tmp_path / "rows.jsonl"), SCALES, OwnColumns({}, rubric))
    tokenizer = make_tokenizer()
    judge = CoTRAILJudge(ScriptedBackend(lambda prompt, seed: "rude [RESULT] 1", tokenizer, probs=[1, 0, 0, 0, 0]))
    judge.rubric, special = rubric, set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for chat in (False, True):
        judge.chat = chat
        (trained,), (judged,) = ([row for _, row in rows(chat)] for rows in (source.training_rows, source.judged_rows))
        judge.judge_response(instruction="ask", response="no<|im_end|>")
        given = judge.backend.generate_calls[-1]["prompts"][0]
        bare = prompt_ids(tokenizer, [{"role": "user", "content": "ask"}]) if chat else []
        for ids in (
            given,
            *(asked_ids(Template(tokenizer), Template(tokenizer).ask(row)) for row in (trained, judged)),
        ):
            assert ids == given
            assert [token for token in ids if token in special] == [token for token in bare if token in special]


def test_rows_of_the_package_are_read_as_they_are(tmp_path):
    rows = make_rows(3, chat=True)
    file = written(tmp_path, "jsonl", rows)
    assert [row for _, row in Source(file, SCALES).training_rows(chat=True)] == rows


def test_training_names_rows_by_their_numbers_in_the_file(tmp_path):
    seed = tmp_path / "seed"
    save_seed(seed)
    rows = rows_of([{"score": "n/a"}, {}, {}, {"prompt": "long " * 90}, {}])
    options = ["--output_dir", str(tmp_path / "out"), "--bf16", "false", "--invalid_rows", "drop", "--max_length", "60"]
    command = ["train", "--model_name_or_path", str(seed), "--data", written(tmp_path, "csv", rows), *options]
    assert main([*command, "--max_steps", "1", "--report_to", "none"]) == 0
    assert not (tmp_path / "out" / "_rows").exists()
    trained = training_dataset(write(tmp_path, rows), SCALES, tmp_path / "arrow")
    with pytest.raises(ValueError, match=r"first: row 3"):
        make_trainer(tmp_path, trained, max_length=60)


def write(folder, rows):
    source = Source(written(folder, "csv", rows), SCALES, None, "drop", lambda _: None)
    write_rows(folder / "train.jsonl", source.training_rows(chat=False))
    return folder / "train.jsonl"


@pytest.mark.parametrize("messages", ["x", 5, [5], {"role": "user"}])
def test_messages_that_are_none_are_refused_by_row(tmp_path, messages):
    source = written(tmp_path, "jsonl", [{"messages": messages, "score": 4}])
    ((number, refusal),) = Source(source, SCALES).found()
    assert (number, refusal.kind) == (0, "not text")
