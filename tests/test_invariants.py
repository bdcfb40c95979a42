"""Same rows, same seed, same update: whatever the batches are cut into, packed as, read from, or spread over."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ASPECTS, make_aspect_rows, make_model, make_rows, make_tokenizer, make_trainer, sharing
from datasets import Dataset

TOKENIZER = make_tokenizer()
# 10 rows at 4 an update, twice: windows of 4, 4 and 2 rows in each epoch. Tokens differ from row to row.
TEN_TWICE = {"num_train_epochs": 2}
# All rows in one update: 9 rows, whatever they are packed into.
AT_ONCE = {"max_steps": 1, "per_device_train_batch_size": 9}


def start() -> Any:
    """Small weights: with larger ones, six steps blow the rounding of float32 up beyond the bound."""
    return make_model(std=0.05)


def trained(output_dir: Path, rows: Any, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The trainer, and the change of every weight from the same random start."""
    settings = {"learning_rate": 0.05, **settings}
    trainer = make_trainer(output_dir, rows, model=start(), tokenizer=TOKENIZER, **settings)
    trainer.train()
    before = start().state_dict()
    return trainer, {k: v.double() - before[k].double() for k, v in trainer.model.state_dict().items()}


def assert_same_update(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    found_vector, wanted_vector = (torch.cat([w.flatten() for w in update.values()]) for update in (found, wanted))
    assert wanted_vector.norm() > 0.1  # far above what float32 rounds away in the weights
    assert (found_vector - wanted_vector).norm().item() <= 1e-5 * wanted_vector.norm().item()


# One update of nine rows, told in many ways: `rows` is what is given for them, the rest are settings.
NINE = make_rows(9)
ROW_BY_ROW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 9}
PACKED = {"packing": True, "max_length": 128}  # rows of at most 61 tokens: several scores a sequence


def prepared(rows: list[dict[str, Any]], output_dir: Path, **settings: Any) -> Dataset:
    """The rows as the trainer's own `input_ids`, `labels` and `score_labels`."""
    return make_trainer(output_dir, rows, tokenizer=TOKENIZER, **settings).train_dataset


SAME_UPDATE: dict[str, dict[str, Any]] = {
    "accumulated 3 x 3": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "accumulated 1 x 9": ROW_BY_ROW,
    "accumulated 4 + 4 + 1": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    "packed": PACKED,
    "packed, accumulated": {**PACKED, **ROW_BY_ROW},
    "padding-free": {"padding_free": True, "max_length": None},
    "padded to a multiple of 64": {"pad_to_multiple_of": 64},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "grouped by length": {"train_sampling_strategy": "group_by_length", **ROW_BY_ROW},
    "two processes tokenise": {"dataset_num_proc": 2},
    "stream": {"rows": lambda rows, _: Dataset.from_list(rows).to_iterable_dataset()},
    "stream, packed": {"rows": lambda rows, _: Dataset.from_list(rows).to_iterable_dataset(), **PACKED},
    "tokenised": {"rows": prepared},
    "tokenised, packed": {"rows": prepared, **PACKED},
    "tokenised and packed before": {"rows": lambda rows, tmp_path: prepared(rows, tmp_path, **PACKED), **PACKED},
    "annotators with that mean": {
        "rows": lambda rows, _: [{**row, "score": [row["score"] - 0.25, row["score"] + 0.25]
                                  if 1 < row["score"] < 5 else [row["score"]]} for row in rows]
    },
    "the annotators' histogram logged": {"annotator_loss": "distribution"},
}  # fmt: skip


@pytest.fixture(scope="module")
def nine_padded(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("nine"), NINE, **AT_ONCE)


@pytest.mark.parametrize("name", SAME_UPDATE)
def test_the_same_rows_give_the_same_update(tmp_path, nine_padded, name):
    settings = dict(SAME_UPDATE[name])
    rows = settings.pop("rows", lambda rows, _: rows)(NINE, tmp_path / "prepared")
    trainer, update = trained(tmp_path / "out", rows, **{**AT_ONCE, **settings})
    if "packed" in name and "stream" not in name:
        scores = [sum(score == score for score in row["score_labels"]) for row in trainer.train_dataset]
        assert sum(scores) == 9
        assert len(set(scores)) > 1  # sequences with unequal numbers of scores
    assert_same_update(update, nine_padded[1])


# Several epochs, with a last window that is not full.


@pytest.fixture(scope="module")
def four_by_one(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("four"), make_rows(10), per_device_train_batch_size=4, **TEN_TWICE)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_does_not_change_the_updates_of_two_epochs(tmp_path, four_by_one, batch, accumulation):
    trainer, update = trained(
        tmp_path,
        make_rows(10),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **TEN_TWICE,
    )
    assert trainer.state.global_step == 6
    assert_same_update(update, four_by_one[1])


@pytest.mark.parametrize("chat", [False, True])
def test_batches_do_not_leak_into_rows(tmp_path, chat):
    # Rows of very unequal length: the padding of the longest must not be felt.
    rows = make_rows(6, seed=3, chat=chat)
    wide = trained(tmp_path / "wide", rows, per_device_train_batch_size=6, max_steps=1)
    narrow = trained(
        tmp_path / "narrow", rows, per_device_train_batch_size=1, gradient_accumulation_steps=6, max_steps=1
    )
    assert_same_update(narrow[1], wide[1])


@pytest.mark.parametrize("settings", [{}, PACKED, {"padding_free": True, "max_length": None}])
def test_several_scores_a_row_survive_packing_and_accumulation(tmp_path, settings):
    rows = make_aspect_rows(9)
    whole = trained(tmp_path / "whole", rows, **AT_ONCE, aspects=ASPECTS)
    cut = trained(tmp_path / "cut", rows, **{**AT_ONCE, **ROW_BY_ROW, **settings}, aspects=ASPECTS)
    assert_same_update(cut[1], whole[1])


@pytest.mark.parametrize("settings", [PACKED, {"padding_free": True, "max_length": None}, ROW_BY_ROW])
def test_the_annotators_histograms_survive_packing_and_accumulation(tmp_path, settings):
    rows = [{**row, "score": [1.0, 1 + i / 2, 5.0]} for i, row in enumerate(make_rows(9))]
    annotated = {"annotator_loss": "distribution", "annotator_weight": 0.5}
    whole = trained(tmp_path / "whole", rows, **AT_ONCE, **annotated)
    cut = trained(tmp_path / "cut", rows, **{**AT_ONCE, **annotated, **settings})
    assert_same_update(cut[1], whole[1])


def test_rows_without_a_score_count_for_the_rationale_alone(tmp_path):
    # Half of the tokenised rows have none: a micro-batch of one of them adds nothing to the score term.
    rows = prepared(NINE, tmp_path / "prepared").map(
        lambda row, i: {"score_labels": [math.nan] * len(row["score_labels"])} if i % 2 else row, with_indices=True
    )
    whole = trained(tmp_path / "whole", rows, **AT_ONCE)
    cut = trained(tmp_path / "cut", rows, **{**AT_ONCE, **ROW_BY_ROW})
    assert_same_update(cut[1], whole[1])


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_trains_like_a_dataset_in_memory(tmp_path, packing):
    # A stream cannot be shuffled as a whole, so both sides take the rows in order; and Trainer does not see where a
    # stream ends, so only full windows are compared: 12 rows are three of them, and pack into five sequences.
    rows = Dataset.from_list(make_rows(12))
    settings = {
        "packing": packing,
        "max_length": 128,
        "max_steps": 1 if packing else 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
    }
    in_memory = trained(tmp_path / "memory", rows, **settings)
    stream = trained(tmp_path / "stream", rows.to_iterable_dataset(), **settings)
    assert_same_update(stream[1], in_memory[1])


# What two ranks do, and the number of rows; one rank takes 4 rows a step. 10 rows leave a last window of 1 row a rank.
TWO_RANKS: dict[str, tuple[int, dict[str, Any]]] = {
    "accumulated": (10, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "not accumulated": (12, {"per_device_train_batch_size": 2}),
    "unequal numbers of scores": (12, {"per_device_train_batch_size": 2}),
    "no score on one rank": (12, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
    "scores of several tokens": (12, {"per_device_train_batch_size": 2}),
    "rows that share a prompt": (12, {"per_device_train_batch_size": 2, "share_prompts": True}),
    "several tokens, no score on one rank": (12, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
}
# Half points: 3 is the beginning of 3.5, and the end of the row tells them apart.
HALVES = {"score_values": [half / 2 for half in range(2, 11)]}


def grid_of(name: str) -> dict[str, Any]:
    """The grid of one case of TWO_RANKS."""
    return HALVES if "several tokens" in name else {}


def rows_of(name: str, output_dir: Path) -> Any:
    """The rows of one case of TWO_RANKS."""
    count, settings = TWO_RANKS[name]
    if "share_prompts" in settings:
        return sharing(make_rows(count), each=2)
    # Accelerate hands out batches of one row in turn, so every odd row goes to the second rank.
    without = {"unequal numbers of scores": [1, 2, 5]}.get(name, range(1, count, 2) if "no score on" in name else [])
    if not without:
        return make_rows(count)
    return prepared(make_rows(count), output_dir, **grid_of(name)).map(
        lambda row, i: {"score_labels": [math.nan] * len(row["score_labels"])} if i in without else row,
        with_indices=True,
    )


IN_ORDER = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
EVAL_ROWS = make_rows(5, seed=7)  # an odd number: the sampler repeats a row to fill the second rank


def update_on_a_rank(output_dir: Path, name: str) -> dict[str, torch.Tensor]:
    _, settings = TWO_RANKS[name]
    return trained(output_dir, rows_of(name, output_dir / "rows"), **settings, **IN_ORDER, **grid_of(name))[1]


def evaluation_on_a_rank(output_dir: Path) -> dict[str, float]:
    # In float64: the scores of an untrained model are nearly the same, and their correlation magnifies rounding.
    model = start().double()
    return make_trainer(output_dir, EVAL_ROWS, model=model, tokenizer=TOKENIZER, eval_dataset=EVAL_ROWS).evaluate()


@pytest.mark.process
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_give_the_update_of_one(tmp_path, two_ranks, name):
    rows = rows_of(name, tmp_path / "rows")
    _, update = trained(tmp_path, rows, per_device_train_batch_size=4, **IN_ORDER, **grid_of(name))
    for found in two_ranks(update_on_a_rank, tmp_path / "ranks", name):
        assert_same_update(found, update)


@pytest.mark.process
def test_two_ranks_evaluate_like_one(tmp_path, two_ranks):
    wanted = evaluation_on_a_rank(tmp_path / "alone")
    for found in two_ranks(evaluation_on_a_rank, tmp_path / "ranks"):
        for name in ("eval_score/pearson", "eval_score/spearman", "eval_score/rmse"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-9), name
