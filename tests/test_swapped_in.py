"""A script for SFTTrainer with the class names swapped: what it passes counts, or is refused in words."""

import math
from typing import Any

import pytest
import torch
from conftest import ASPECTS, make_aspect_rows, make_model, make_rows, make_tokenizer, make_trainer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BloomConfig

from trl_tract.rows.dataset import ScoreCollator

TOKENIZER = make_tokenizer()


def conversations(rows: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    return [{"messages": row["prompt"] + row["completion"], "score": row["score"], **more} for row in rows]


def labelled(trainer: Any) -> list[str]:
    """The text that the cross-entropy of each row is of, `_` where a token has no part in it."""
    return [
        "".join("_" if label == -100 else TOKENIZER.decode([label]) for label in row["labels"]).lstrip("_")
        for row in trainer.train_dataset
    ]


# Rows.


@pytest.mark.parametrize("completion_only_loss", [None, True, False])
def test_a_conversation_has_the_labels_of_its_prompt_and_completion(tmp_path, completion_only_loss):
    rows = make_rows(3, chat=True)
    settings = {"tokenizer": TOKENIZER, "completion_only_loss": completion_only_loss}
    wanted = labelled(make_trainer(tmp_path, rows, **settings))
    assert labelled(make_trainer(tmp_path, conversations(rows), **settings)) == wanted
    # As in the rows of ultrachat, whose `prompt` is the first message once more.
    assert labelled(make_trainer(tmp_path, conversations(rows, prompt="is this polite?"), **settings)) == wanted


# A row that was tokenised by somebody else.


@pytest.mark.parametrize("score_in_ce", [True, False])
def test_tokenised_rows_have_their_scores_in_the_cross_entropy_as_the_settings_say(tmp_path, score_in_ce):
    rows = make_rows(3)
    before = make_trainer(tmp_path, rows, score_in_ce=not score_in_ce).train_dataset
    trainer = make_trainer(tmp_path, before, score_in_ce=score_in_ce)
    wanted = make_trainer(tmp_path, rows, score_in_ce=score_in_ce).train_dataset
    assert trainer.train_dataset["labels"] == wanted["labels"]
    assert trainer.train_dataset["labels"] != before["labels"]


def test_a_tokenised_row_whose_score_is_a_digit_of_its_rationale_is_named(tmp_path):
    texts = [" 4 points hold [RESULT] 4", " 2 of 4 points hold [RESULT] 4", " no [RESULT] 1"]
    rows = list(make_trainer(tmp_path, [{"prompt": "ask", "completion": text} for text in texts]).train_dataset)
    first = rows[1]["input_ids"].index(TOKENIZER.convert_tokens_to_ids("4"))
    rows[1]["score_labels"] = [4.0 if place == first else math.nan for place in range(len(rows[1]["input_ids"]))]
    with pytest.raises(ValueError, match=r"1 of 3 train rows refused \(no marker; first: row 1\)"):
        make_trainer(tmp_path, Dataset.from_list(rows))


@pytest.mark.parametrize("name", ["train", "eval"])
def test_rationales_that_are_tokens_already_cannot_be_dropped(tmp_path, name):
    tokenised = make_trainer(tmp_path, make_rows(3)).train_dataset
    train, evaluation = (tokenised, None) if name == "train" else (make_rows(3), tokenised)
    with pytest.raises(ValueError, match=f"drop_rationale=True .* the {name} dataset is tokenised"):
        make_trainer(tmp_path, train, eval_dataset=evaluation, drop_rationale=True)


# Batches.


@pytest.mark.parametrize(
    ("column", "rows", "settings"),
    [
        ("annotator_labels", make_rows(4), {"annotator_loss": "distribution", "annotator_weight": 1.0}),
        ("score_aspects", make_aspect_rows(4), {"aspects": ASPECTS}),
    ],
)
def test_a_collator_that_drops_what_the_loss_needs_is_found_at_the_first_batch(tmp_path, column, rows, settings):
    class Dropping(ScoreCollator):
        def torch_call(self, examples):
            return {name: value for name, value in super().torch_call(examples).items() if name != column}

    trainer = make_trainer(tmp_path, rows, extra={"data_collator": Dropping(pad_token_id=3)}, **settings)
    with pytest.raises(ValueError, match=f"the batch has no {column}.*Leave data_collator out"):
        trainer.train()


def test_rows_that_are_packed_for_evaluation_alone_do_not_see_each_other(tmp_path):
    held_out = make_rows(9, seed=1)
    wanted = make_trainer(tmp_path, make_rows(4), eval_dataset=held_out).evaluate()
    settings = {"eval_packing": True, "max_length": 128, "per_device_eval_batch_size": 2}
    trainer = make_trainer(tmp_path, make_rows(4), eval_dataset=held_out, **settings)
    assert len(trainer.eval_dataset) < 9
    found = trainer.evaluate()
    for name in ("eval_loss/rationale", "eval_loss/score", "eval_score/pearson"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-4)


@pytest.mark.parametrize(
    "settings", [{"packing": True}, {"eval_packing": True}, {"padding_free": True, "max_length": None}]
)
def test_a_model_that_does_not_keep_packed_rows_apart_is_refused(tmp_path, settings):
    # ALiBi counts positions by itself.
    config = BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="BloomForCausalLM does not keep packed rows apart"):
        make_trainer(tmp_path, make_rows(4), model=model, **settings)
    assert model.training
    make_trainer(tmp_path, make_rows(4), model=model)


# Predictions.


def test_a_prediction_is_of_every_row_even_where_training_drops_the_last_batch(tmp_path):
    settings = {"per_device_eval_batch_size": 2, "dataloader_drop_last": True}
    trainer = make_trainer(tmp_path, make_rows(4), **settings)
    assert len(trainer.predict(Dataset.from_list(make_rows(5, seed=6))).predictions) == 5
    assert trainer.args.dataloader_drop_last


def test_a_prediction_is_of_scores_also_where_compute_metrics_sees_the_logits(tmp_path):
    rows = Dataset.from_list(make_rows(3, seed=6))
    wanted = make_trainer(tmp_path, make_rows(4)).predict(rows)
    trainer = make_trainer(tmp_path, make_rows(4), extra={"compute_metrics": lambda seen: {"mine": 1.0}})
    with pytest.warns(FutureWarning, match="return_outputs=True"):  # TRL's: it costs a second forward pass
        found = trainer.predict(rows)
    assert found.metrics["test_mine"] == 1.0
    assert found.predictions.tolist() == pytest.approx(wanted.predictions.tolist(), rel=1e-5)
    assert found.label_ids.tolist() == wanted.label_ids.tolist()


def test_a_tokenised_row_without_a_score_is_not_predicted(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(3))
    rows = list(trainer.train_dataset)
    rows[1] = rows[1] | {"score_labels": [math.nan] * len(rows[1]["labels"])}
    with pytest.raises(ValueError, match="row 1 of the test dataset has no score in score_labels"):
        trainer.predict(Dataset.from_list(rows))


def test_packed_rows_are_not_predicted(tmp_path):
    trainer = make_trainer(tmp_path, make_rows(8), packing=True, max_length=128)
    with pytest.raises(ValueError, match="the test dataset is packed"):
        trainer.predict(trainer.train_dataset)


# The rest.


def test_an_evaluation_set_called_train_is_not_what_was_trained_on(tmp_path):
    bad = {"prompt": "ask", "completion": " no score", "score": 3.0}
    held_out = {"train": Dataset.from_list([*make_rows(3, seed=1), bad])}
    trainer = make_trainer(tmp_path, [*make_rows(8), bad], eval_dataset=held_out, invalid_rows="drop")
    trainer.create_model_card()
    assert "- Rows: 8\n" in (tmp_path / "README.md").read_text()


def test_what_one_training_did_not_log_is_not_in_the_log_of_the_next(tmp_path):
    # Logged after three of four steps, and an evaluation stands before the end: the fourth is in no log.
    trainer = make_trainer(
        tmp_path,
        make_rows(8),
        eval_dataset=make_rows(2, seed=3),
        learning_rate=0.0,
        max_steps=4,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=4,
    )
    logged = []
    for _ in range(2):
        trainer.train()
        logged += [
            {name: entry[name] for name in ("loss/score", "loss/rationale", "entropy")}
            for entry in trainer.state.log_history
            if "loss/score" in entry
        ]
    assert len(logged) == 2
    assert logged[0] == logged[1]


def test_it_is_said_when_no_checkpoint_was_the_best(tmp_path, caplog):
    caplog.set_level("WARNING")
    constant = [row | {"score": 3.0} for row in make_rows(4, seed=3)]  # nothing correlates with it
    trainer = make_trainer(
        tmp_path,
        make_rows(4),
        eval_dataset=constant,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score/pearson",
    )
    trainer.train()
    assert "score/pearson was NaN at every evaluation. The saved model is from the last step" in caplog.text


def test_an_optimizer_of_frozen_weights_is_refused(tmp_path):
    model = make_model()
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="optimizers holds none of the weights that are trained"):
        make_trainer(
            tmp_path, make_rows(4), model=model, extra={"peft_config": adapter, "optimizers": (optimizer, None)}
        )
