"""One real mistake each, and the message that a person would want: what is wrong, where, and what to do."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import ASPECTS, make_aspect_rows, make_model, make_rows, make_tokenizer, make_trainer
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import ByT5Tokenizer, TrainingArguments
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_tract import TRACTConfig, TRACTTrainer
from trl_tract.rows.dataset import ScoreCollator
from trl_tract.saved.judge_config import JudgeConfig

TOKENS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
REST = "Or set invalid_rows='drop' to continue without them."


def rows_with(**wrong: Any) -> list[dict[str, Any]]:
    """Three rows, the second of which is wrong."""
    # Dataset.from_list takes the columns from the first row alone.
    rows = [{**dict.fromkeys(wrong), **row} for row in make_rows(3)]
    rows[1] |= wrong
    return rows


# name: (rows, settings of the config, arguments of the trainer, what the message holds)
MISTAKES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], list[str]]] = {
    "no marker in one row": (
        rows_with(completion=" fine. 4"),
        {},
        {},
        ["1 of 3 train rows refused (no marker; first: row 1)", "does not hold the marker '[RESULT]'", REST],
    ),
    "no marker in any row": (
        [{"prompt": "ask", "completion": " Score: 4"}] * 3,
        {},
        {},
        [
            "no score was found in any of the first 3 rows",
            "does not hold the marker '[RESULT]'",
            "Write every completion as '<rationale> [RESULT] <score>'",
            "For another marker or grid, set score_marker or score_values",
        ],
    ),
    "two scores": (
        rows_with(completion=" fine. [RESULT] 4 no, [RESULT] 5"),
        {},
        {},
        ["1 of 3 train rows refused (two scores; first: row 1)", "twice: '4' and '5'", REST],
    ),
    "a written score off the grid": (
        rows_with(completion=" fine. [RESULT] 7"),
        {},
        {},
        ["(not on the grid; first: row 1)", "'7' follows the marker; the admissible scores are 1, 2, 3, 4, 5", REST],
    ),
    "a gold score off the range": (
        rows_with(score=7.5),
        {},
        {},
        ["1 of 3 train rows refused (off the range; first: row 1)", "7.5 is not between 1 and 5", REST],
    ),
    "a score that is a word": (
        [row | {"score": "good"} for row in make_rows(3)],
        {},
        {},
        ["3 of 3 train rows refused (not a number; first: row 0)", "the score is 'good', not a number", REST],
    ),
    "a row cut by max_length": (
        rows_with(prompt="is this polite? " * 20),
        {"max_length": 60},
        {},
        # 20 x 7 tokens and the completion
        ["1 of 3 train rows lose their score at max_length=60 (first: row 1, ", "Set max_length to ", REST],
    ),
    "every row cut and dropped": (
        make_rows(3),
        {"max_length": 5, "invalid_rows": "drop"},
        {},
        ["No row is left. 3 of 3 train rows lose their score at max_length=5", "Set max_length to "],
    ),
    "an empty completion": (
        rows_with(completion=""),
        {},
        {},
        ["1 of 3 train rows refused (empty; first: row 1)", "the completion is empty", REST],
    ),
    "a missing completion": (
        rows_with(completion=None),
        {},
        {},
        ["1 of 3 train rows refused (empty; first: row 1)", "the completion is missing", REST],
    ),
    "a missing prompt": (
        rows_with(prompt=None),
        {},
        {},
        ["1 of 3 train rows refused (no prompt; first: row 1)", "the prompt is missing", REST],
    ),
    "an empty dataset": (
        Dataset.from_dict({"prompt": [], "completion": []}),
        {},
        {},
        ["the train dataset is empty"],
    ),
    "an empty evaluation dataset": (
        make_rows(3),
        {},
        {"eval_dataset": Dataset.from_dict({"prompt": [], "completion": []})},
        ["the eval dataset is empty"],
    ),
    "text-only rows": (
        [{"text": "ask fine. [RESULT] 4"}],
        {},
        {},
        ["the train dataset has the columns text", "where the prompt ends", "`prompt` and `completion`", "`messages`"],
    ),
    "messages that end with the user": (
        [{"messages": [{"role": "user", "content": "fine. [RESULT] 4"}]}],
        {},
        {},
        ["Row 0: the last message does not have the role assistant"],
    ),
    "a completion without messages": (
        [
            {"prompt": [{"role": "user", "content": "ask"}], "completion": answer, "score": 4}
            for answer in ([{"role": "assistant", "content": "fine. [RESULT] 4"}], [])
        ],
        {},
        {},
        ["1 of 2 train rows refused (empty; first: row 1): the completion is missing", REST],
    ),
    "messages that begin with the assistant": (
        [
            {"messages": [{"role": role, "content": "fine. [RESULT] 4"} for role in roles]}
            for roles in (["user", "assistant"], ["assistant"])
        ],
        {},
        {},
        ["1 of 2 train rows refused (no prompt; first: row 1): the prompt is missing", REST],
    ),
    "a text prompt with a chat completion": (
        [{"prompt": "ask", "completion": [{"role": "assistant", "content": "fine. [RESULT] 4"}]}],
        {},
        {},
        ["Row 0: prompt and completion must both be text, or both chat messages"],
    ),
    "fewer texts than values": (
        make_rows(3, fractions=False),
        {"score_texts": ["poor", "good"]},
        {},
        ["score_texts has 2 entries, but score_values has 5", "Give one text for each value"],
    ),
    "chat rows without a chat template": (
        make_rows(3, chat=True),
        {},
        {"tokenizer": make_tokenizer(chat=False)},
        ["this tokenizer has no chat template", "as plain text, or set chat_template_path"],
    ),
    "a slow tokenizer": (
        make_rows(3),
        {},
        {"tokenizer": ByT5Tokenizer()},
        ["ByT5Tokenizer gives no character offsets", "Load the fast tokenizer"],
    ),
    "several gold scores without aspects": (
        rows_with(scores=[4.0]),
        {},
        {},
        ["(several scores; first: row 1)", "as a list in `score`, or name several scores in `aspects`", REST],
    ),
    "an annotator off the range": (
        [row | {"score": [3.0, 3.0]} for row in make_rows(2)] + [make_rows(1)[0] | {"score": [3.0, 0.0]}],
        {},
        {},
        ["(off the range; first: row 2)", "the score 0 is not between 1 and 5", REST],
    ),
    "an unknown annotator loss": (
        make_rows(3),
        {"annotator_loss": "kl"},
        {},
        ["annotator_loss='kl' is unknown: choose 'none' or 'distribution'"],
    ),
    "a weight on no annotator loss": (
        make_rows(3),
        {"annotator_weight": 1.0},
        {},
        ["annotator_weight=1 has no effect", "Set annotator_loss='distribution' as well"],
    ),
    "tokenised training rows without score_labels": (
        [TOKENS],
        {},
        {},
        ["the train dataset is tokenised (columns: input_ids, labels) but lacks score_labels", "Or pass rows with"],
    ),
    "tokenised rows without the annotators": (
        [TOKENS | {"score_labels": [math.nan] * 3}],
        {"annotator_loss": "distribution"},
        {},
        ["lacks annotators_1, annotators_2, annotators_3", "the fraction of annotators who gave that score"],
    ),
    "tokenised rows without any score": (
        [TOKENS | {"score_labels": [math.nan] * 3}],
        {},
        {},
        ["no score was found in any of the first 1 rows", "score_labels holds no score"],
    ),
    "a gold score at a token that is no score": (
        [TOKENS | {"score_labels": [math.nan, 4.0, math.nan]}],
        {},
        {},
        ["score_labels marks token 1 (", "which is none of the scores 1, 2, 3, 4, 5"],
    ),
    "tokenised evaluation rows without score_labels": (
        make_rows(3),
        {},
        {"eval_dataset": [TOKENS]},
        ["the eval dataset is tokenised", "lacks score_labels", "the gold score at the score's token, NaN elsewhere"],
    ),
    "skipped preparation": (
        make_rows(3),
        {"dataset_kwargs": {"skip_prepare_dataset": True}},
        {},
        ["skip_prepare_dataset", "the step that finds the scores", "Leave it out"],
    ),
    "a loss function of one's own": (
        make_rows(3),
        {},
        {"extra": {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.loss}},
        ["compute_loss_func", "computes the CoT-RAFT loss itself", "Leave it out"],
    ),
    "a formatting function": (
        make_rows(3),
        {},
        {"extra": {"formatting_func": lambda row: row["prompt"] + row["completion"]}},
        ["formatting_func", "needs prompt and completion separately", "Leave it out", "dataset.map"],
    ),
    "prompt tuning": (
        make_rows(3),
        {},
        {"extra": {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}},
        ["prompt tuning puts virtual tokens before each row", "Use LoRA"],
    ),
    "single tokens of tied embeddings": (
        make_rows(3),
        {},
        {
            "model": make_model("qwen2"),
            "extra": {"peft_config": LoraConfig(target_modules="all-linear", trainable_token_indices=[5])},
        },
        [
            "trainable_token_indices does not work with embeddings that are tied",
            "put the embeddings into target_modules",
        ],
    ),
    "wrapped packing": (
        make_rows(3),
        {"packing": True, "packing_strategy": "wrapped"},
        {},
        ["packing_strategy='wrapped' may cut a row in two", "Use packing_strategy='bfd'"],
    ),
    "packing that splits": (
        make_rows(3),
        {"packing": True, "packing_strategy": "bfd_split"},
        {},
        ["packing_strategy='bfd_split' may cut a row in two", "Use packing_strategy='bfd'"],
    ),
    "a loss on all assistant turns": (
        make_rows(3, chat=True),
        {"assistant_only_loss": True},
        {},
        ["assistant_only_loss=True", "the last assistant turn", "Leave it out"],
    ),
    "an empty marker": (
        make_rows(3),
        {"score_marker": " "},
        {},
        ["score_marker=' ' must be text", 'quotes: "[RESULT]"'],
    ),
    "a marker that YAML made a list of": (
        make_rows(3),
        {"score_marker": ["RESULT"]},
        {},
        ["score_marker=['RESULT'] must be text", 'quotes: "[RESULT]"'],
    ),
    "scores that YAML made booleans of": (
        make_rows(3),
        {"score_values": [False, True]},
        {},
        ["score_values=[False, True] is not a list of numbers"],
    ),
    "a grid that decreases": (make_rows(3), {"score_values": [5, 1]}, {}, ["score_values=[5, 1] must increase"]),
    "a grid of one": (make_rows(3), {"score_values": [5]}, {}, ["score_values=[5] holds 1 score(s)", "two or more"]),
    "a negative weight": (make_rows(3), {"raft_weight": -1.0}, {}, ["raft_weight=-1.0 must be", "0 or greater"]),
    "no weight at all": (
        make_rows(3),
        {"raft_weight": 0.0, "rationale_weight": 0.0},
        {},
        ["raft_weight and rationale_weight are both 0"],
    ),
    "no weight in any aspect": (
        make_aspect_rows(3),
        {"aspects": {name: {**scale, "raft_weight": 0} for name, scale in ASPECTS.items()}, "rationale_weight": 0.0},
        {},
        ["raft_weight and rationale_weight are both 0"],
    ),
    "packing without a length": (
        make_rows(3),
        {"packing": True, "max_length": None},
        {},
        ["packing needs max_length"],
    ),
    "a conversation beside a completion": (
        [row | {"messages": [{"role": "assistant", "content": "no [RESULT] 1"}]} for row in make_rows(3)],
        {},
        {},
        ["the train dataset has `messages` and `completion`", "dataset.remove_columns(...)"],
    ),
    "a transform": (
        Dataset.from_list(make_rows(3)).with_transform(dict),
        {},
        {},
        ["the train dataset has a transform", "only once", "dataset.map(...)", "dataset.reset_format()"],
    ),
    "packing for evaluation with a collator": (
        make_rows(3),
        {"eval_packing": True},
        {"extra": {"data_collator": ScoreCollator(pad_token_id=3)}},
        ["eval_packing=True needs the default collator"],
    ),
    "an unknown way with invalid rows": (
        make_rows(3),
        {"invalid_rows": "skip"},
        {},
        ["invalid_rows='skip' is unknown: choose 'raise' or 'drop'"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_value_error_that_says_what_to_do(tmp_path, name):
    rows, settings, arguments, parts = MISTAKES[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is checked part by part
        make_trainer(tmp_path, rows, **settings, **arguments)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        (lambda row: row | {"labels": row["labels"][:-1]}, ["(unequal lengths; first: row 1)", "labels"]),
        (
            lambda row: row | {"input_ids": [7, *row["input_ids"][:-1]]},  # all tokens one place to the right
            ["(other tokens; first: row 1)", "which is none of the scores' tokens"],
        ),
        (
            lambda row: row | {"score_labels": [s if math.isnan(s) else 9.0 for s in row["score_labels"]]},
            ["(off the range; first: row 1)", "the score 9 is not between 1 and 5"],
        ),
    ],
)
def test_a_tokenised_row_that_does_not_fit_together_is_named(tmp_path, wrong, parts):
    rows = list(make_trainer(tmp_path, make_rows(3)).train_dataset)
    rows[1] = wrong(rows[1])
    with pytest.raises(ValueError, match="1 of 3 train rows refused") as caught:
        make_trainer(tmp_path, rows)
    for part in parts:
        assert part in str(caught.value)


def test_a_tokenised_row_that_loses_its_score_to_max_length_is_refused(tmp_path):
    rows = make_trainer(tmp_path, make_rows(3)).train_dataset
    with pytest.raises(ValueError, match=r"lose their score at max_length=30 \(first: row 0, \d+ tokens"):
        make_trainer(tmp_path, rows, max_length=30)


def test_resuming_without_a_complete_checkpoint_says_so(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        make_trainer(tmp_path, make_rows(3)).train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")  # TRL's own
def test_truncation_from_the_left_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"truncation_mode='keep_end' would cut off the rubric.*set max_length or"):
        make_trainer(tmp_path, make_rows(3), truncation_mode="keep_end")


def test_a_cut_row_is_named_with_its_length_and_the_length_to_set(tmp_path):
    rows = rows_with(prompt="is this polite? " * 20)
    length = len(make_tokenizer()(rows[1]["prompt"] + rows[1]["completion"]).input_ids) + 1  # and <|end|>
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make_trainer(tmp_path, rows, max_length=60)
    assert str(caught.value) == (
        f"1 of 3 train rows lose their score at max_length=60 (first: row 1, {length} tokens; longest: {length}). Set "
        f"max_length to {length} or more. Or set invalid_rows='drop' to continue without them."
    )


def test_the_length_that_the_message_names_is_enough(tmp_path):
    rows = rows_with(prompt="is this polite? " * 20)
    length = len(make_tokenizer()(rows[1]["prompt"] + rows[1]["completion"]).input_ids) + 1
    assert len(make_trainer(tmp_path, rows, max_length=length).train_dataset) == 3


def test_a_row_that_loses_only_what_follows_its_score_is_kept(tmp_path):
    # One token less than the row has: <|end|> goes, the score stays.
    rows = make_rows(1)
    length = len(make_tokenizer()(rows[0]["prompt"] + rows[0]["completion"]).input_ids)
    (row,) = make_trainer(tmp_path, rows, max_length=length).train_dataset
    assert len(row["input_ids"]) == length
    assert row["score_labels"][-1] == rows[0]["score"]


def test_reasons_are_counted_one_by_one(tmp_path):
    rows = make_rows(5)
    rows[1]["completion"] = rows[3]["completion"] = " fine. 4"
    rows[4]["score"] = 9.0
    with pytest.raises(ValueError, match=r"2 of 5 train rows refused \(no marker; first: row 1\).* 1 of 5 train rows "
                                         r"refused \(off the range; first: row 4\)"):  # fmt: skip
        make_trainer(tmp_path, rows)


@pytest.fixture
def warned(caplog, monkeypatch):
    """Messages of the package's logger, which transformers keeps from the root logger."""
    monkeypatch.setattr(logging.getLogger("trl_tract.training.trainer"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("trl_tract")]


def test_dropping_trains_on_the_rest_and_says_how_many_went(tmp_path, warned):
    rows = make_rows(6)
    rows[2]["completion"] = " fine."
    rows[5]["score"] = 6.0
    trainer = make_trainer(tmp_path, rows, invalid_rows="drop", num_train_epochs=1, learning_rate=1e-3)
    assert len(trainer.train_dataset) == 4
    assert trainer.train().global_step == 1
    (message,) = warned()
    assert message.startswith("Continuing without them: 1 of 6 train rows refused (no marker; first: row 2)")
    assert "1 of 6 train rows refused (off the range; first: row 5)" in message


def test_dropping_works_where_the_first_thousand_rows_are_all_bad(tmp_path):
    # `datasets` writes a thousand rows at a time and takes the columns' types from the first of them.
    bad = [{"prompt": "ask", "completion": "no score", "score": 1.0}] * 1000
    trainer = make_trainer(tmp_path, make_rows(2), eval_dataset=bad + make_rows(2), invalid_rows="drop")
    assert len(trainer.eval_dataset) == 2


def test_a_bad_row_of_a_stream_is_named_when_its_turn_comes(tmp_path):
    rows = Dataset.from_list(rows_with(completion=" fine.")).to_iterable_dataset()
    trainer = make_trainer(tmp_path, rows, max_steps=1)
    with pytest.raises(ValueError, match=r"train row 1 refused \(no marker\): .*invalid_rows='drop'"):
        trainer.train()


def test_a_stream_goes_on_without_its_bad_rows_and_counts_them(tmp_path, warned):
    rows = Dataset.from_list(rows_with(completion=" fine.")).to_iterable_dataset()
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    trainer = make_trainer(tmp_path, rows, invalid_rows="drop", **settings)
    assert trainer.train().global_step == 1
    assert warned() == [
        "Dropped 1 row(s) of the stream so far, the last one: train row 1 refused (no marker): the completion does not "
        "hold the marker '[RESULT]'."
    ]


def test_a_collator_that_drops_the_scores_is_found_at_the_first_batch(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(4), extra={"data_collator": DataCollatorForLanguageModeling(3)})
    with pytest.raises(ValueError, match=r"the batch has no score_labels.*Leave data_collator out"):
        trainer.train()


@pytest.mark.parametrize("config_class", [SFTConfig, TrainingArguments])
def test_a_plain_config_gets_the_same_refusals(tmp_path, config_class):
    args = config_class(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="1 of 3 train rows refused"):
        TRACTTrainer(
            make_model(),
            args=args,
            train_dataset=Dataset.from_list(rows_with(completion=" fine.")),
            processing_class=make_tokenizer(),
        )


def test_the_command_line_help_of_the_config_can_be_printed():
    # argparse formats help texts with %: a bare one kills `--help`.
    from trl import TrlParser

    assert "score_marker" in TrlParser(TRACTConfig).format_help()


# tract_config.json


def test_a_directory_without_tract_config_says_who_writes_it_and_how_to_do_without(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        JudgeConfig.load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'tract_config.json'} is missing.")
    assert "saved by TRACTTrainer.save_model()" in message
    assert "CoTRAILJudge(backend, score_values=[...], score_marker=...)" in message


def test_a_path_that_is_no_directory_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a model directory"):
        JudgeConfig.load(tmp_path / "nowhere")


def test_a_hub_id_that_cannot_be_reached_says_what_was_looked_for():
    with pytest.raises(FileNotFoundError, match=r"no tract_config\.json at nobody/nothing"):
        JudgeConfig.load("nobody/nothing")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"score_values": [1, 2', "JSONDecodeError"),
        ('{"score_values": [1, 2]}', "KeyError('score_texts')"),
        ("[]", "AttributeError"),
    ],
)
def test_a_broken_tract_config_is_named_with_what_is_wrong(tmp_path: Path, text, problem):
    (tmp_path / "tract_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot be read as tract_config\.json") as caught:
        JudgeConfig.load(tmp_path)
    assert problem in str(caught.value)
    assert str(tmp_path) in str(caught.value)
