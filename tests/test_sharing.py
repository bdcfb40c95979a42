"""Rows that share a beginning, computed as one tree: what they see, and that loss, gradients and metrics stay."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ASPECTS, make_aspect_rows, make_model, make_rows, make_trainer, sharing
from datasets import Dataset
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_branches import assert_same_gradients, gradients, loss_of, oracle, settings_of, tiny
from test_branches import make_rows as make_grid_rows
from test_oracle import TOKENIZER, assert_equals_the_formula
from test_trie import GRIDS
from transformers import Gemma3TextConfig, MistralConfig, TrainerCallback

from trl_tract import TRACTConfig
from trl_tract.backends import branches
from trl_tract.backends.branches import TreePass
from trl_tract.backends.tree import Layout, lay_out
from trl_tract.runs.spec import RunSpec
from trl_tract.training.sharing import SharingSampler, beginnings, sharing_warnings

# The tree

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=7)


def numbered(tokens: list[int], first: int = 0) -> np.ndarray:
    """Token ids and positions, `(n, 2)`."""
    return np.stack([np.array(tokens), first + np.arange(len(tokens))], axis=1)


def seen_by(layout: Layout, place: int) -> list[int]:
    """The places that a token sees, by the rule of `Layout`, token by token."""
    row, query = divmod(place, layout.ends.shape[1])
    return [row * layout.ends.shape[1] + key for key in range(query + 1) if query < layout.ends[row, key]]


@given(SEQUENCES, st.booleans(), st.sampled_from([0.0, 0.01, 10.0]), st.data())
def test_each_token_sees_its_own_sequence_up_to_itself(sequences, share, attention, data):
    owners = data.draw(st.lists(st.integers(0, 2), min_size=len(sequences), max_size=len(sequences)))
    layout, _ = lay_out([numbered(each) for each in sequences], owners, share=share, attention=attention)
    for sequence, places in zip(sequences, layout.places, strict=True):
        assert layout.tokens.flatten()[places].tolist() == sequence
        assert layout.positions.flatten()[places].tolist() == list(range(len(sequence)))
        for count, place in enumerate(places.tolist(), start=1):
            assert seen_by(layout, place) == places[:count].tolist()


@given(SEQUENCES)
def test_every_beginning_stands_once(sequences):
    sequences = [[9, *each] for each in sequences]  # one tree, so that no row is filled up
    layout, cost = lay_out([numbered(each) for each in sequences], range(len(sequences)), share=True, attention=0.0)
    beginnings = {tuple(each[: i + 1]) for each in sequences for i in range(len(each))}
    assert len({place for places in layout.places for place in places.tolist()}) == len(beginnings)
    assert cost == len(beginnings)


@given(SEQUENCES, st.sampled_from([0.0, 0.01, 10.0]))
def test_sharing_never_costs_more_than_not_sharing(sequences, attention):
    numbers = [numbered(each) for each in sequences]
    costs = [lay_out(numbers, range(len(numbers)), share=share, attention=attention)[1] for share in (True, False)]
    assert costs[0] <= costs[1]


def test_the_same_tokens_at_other_positions_are_not_the_same():
    layout, _ = lay_out([numbered([1, 2]), numbered([1, 2], first=1)], [0, 1], share=True, attention=0.0)
    assert not set(layout.places[0]) & set(layout.places[1])


def test_a_short_common_beginning_is_no_reason_for_one_long_row():
    # 8 rows that share a header of 2 tokens: merged, each of 786 tokens would attend to 786.
    rows = [numbered([7, 7, *range(10 + i, 108 + i)]) for i in range(8)]
    layout, _ = lay_out(rows, range(8), share=True, attention=0.01)
    assert layout.tokens.shape == (8, 100)


@pytest.mark.parametrize(
    ("sizes", "cost"),
    [
        # 2.5 x heads / (4 x width x heads + 3 x width x inner), with heads as wide as the model where nothing is said.
        ({"hidden_size": 8}, 2.5 * 8 / (4 * 8 * 8 + 3 * 8 * 32)),
        ({"hidden_size": 8, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 16}, 40 / (512 + 384)),
        ({"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": [8, 24]}, 20 / (256 + 384)),
    ],
)
def test_the_price_of_attention_follows_from_a_models_widths(sizes, cost):
    assert branches.attention_cost(SimpleNamespace(**sizes)) == pytest.approx(cost)


# Hidden states

FAMILIES = [
    *((family, attention) for family in ("llama", "gpt_neox", "mistral", "gemma3") for attention in ("sdpa", "eager")),
    ("gemma2", "eager"),
]


def small(family: str, attention: str) -> Any:
    sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 5}  # shorter than the rows
    if family == "mistral":
        model = tiny(MistralConfig, **sizes)
    elif family == "gemma3":
        model = tiny(Gemma3TextConfig, **sizes, head_dim=8, layer_types=["sliding_attention", "full_attention"])
    else:
        model = make_model(family)
        if family == "gemma2":
            model.config.sliding_window = 5
    model.set_attn_implementation(attention)
    # In float64, the host's own eager attention makes NaN of left padding.
    return model.eval().to(torch.float64 if attention == "sdpa" else torch.float32)


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], Any]:
    return {key: small(*key) for key in FAMILIES}


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
@hypothesis_settings(max_examples=40)
@given(rows=st.lists(st.lists(st.integers(4, 6), min_size=2, max_size=12), min_size=1, max_size=6), left=st.booleans())
def test_hidden_states_are_those_of_each_row_alone(models, family, attention, rows, left):
    model = models[family, attention]
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), 3), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(length - len(row), None) if left else slice(len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if left:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    tree = TreePass(None, torch.zeros(len(rows), length - 1, dtype=torch.bool), model.config, share=True)
    with torch.no_grad(), free_attention():
        output = model.base_model(**tree.extend(model.base_model, (), inputs)[1])
        tree.split(output)
        for i, row in enumerate(rows):
            alone = model.base_model(torch.tensor([row]), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(output.last_hidden_state[i][mask[i].bool()], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # it is compiled
def test_flex_attention_has_the_hidden_states_of_sdpa():
    # Forward alone: on a CPU it has no backward pass.
    rows = torch.tensor([[4, 5, 6, 7], [4, 5, 5, 6], [4, 5, 6, 4]])
    found = []
    for attention in ("flex_attention", "sdpa"):
        model = small("gemma3", attention).float()
        tree = TreePass(None, torch.zeros(3, 3, dtype=torch.bool), model.config, share=True)
        with torch.no_grad(), free_attention():
            _, inputs = tree.extend(model.base_model, (), {"input_ids": rows, "use_cache": False})
            assert inputs["input_ids"].numel() == 7
            output = model.base_model(**inputs)
            tree.split(output)
        found.append(output.last_hidden_state)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@contextmanager
def free_attention() -> Iterator[None]:
    """Everything is shared that can be, also where it does not pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branches, "attention_cost", lambda config: 0.0)
        yield


# Training

NINE = sharing(make_rows(9))
# The same rows meet in a micro-batch: TRL averages entropy and accuracy over micro-batches.
AT_ONCE = {"max_steps": 1, "per_device_train_batch_size": 9, "learning_rate": 0.05, "share_batches": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "accumulated 3 x 3": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "accumulated 1 x 9": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 9},
    "accumulated 4 + 4 + 1": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    "packed": {"packing": True, "max_length": 128},
    "packed, accumulated": {"packing": True, "max_length": 128, "gradient_accumulation_steps": 9,
                            "per_device_train_batch_size": 1},
    "padding-free": {"padding_free": True, "max_length": None},
    "padded to a multiple of 64": {"pad_to_multiple_of": 64},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "a stream": {"rows": lambda rows: Dataset.from_list(rows).to_iterable_dataset()},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "the score in the cross-entropy": {"score_in_ce": True},
    "without a rationale": {"drop_rationale": True},
    "grids of several tokens": {"score_values": [half / 2 for half in range(2, 11)]},
    "several aspects": {"rows": lambda rows: sharing(make_aspect_rows(9)), "aspects": ASPECTS},
    "annotators": {
        "rows": lambda rows: [{**row, "score": [1.0, row["score"], 5.0]} for row in rows],
        "annotator_loss": "distribution",
        "annotator_weight": 0.5,
    },
    "LoRA": {"extra": {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")},
             "learning_rate": 2.0},
    "experts": {"family": "mixtral", "model": {"router_aux_loss_coef": 0.5}},
    "experts, padding-free": {"family": "qwen3_moe", "padding_free": True, "max_length": None,
                              "model": {"router_aux_loss_coef": 0.5}},
    "eager attention": {"model": {"_attn_implementation": "eager"}},
    "windows": {"family": "gemma2", "model": {"sliding_window": 8}},
}  # fmt: skip


def trained(output_dir: Any, *, share: bool, **settings: Any) -> tuple[torch.Tensor, dict[str, float], int]:
    """The change of every weight, what was logged, and the number of tokens that the model was given."""
    settings = {**AT_ONCE, "logging_strategy": "steps", "logging_steps": 1, **settings}
    rows = settings.pop("rows", lambda rows: rows)(NINE)
    model = make_model(settings.pop("family", "llama"), std=0.05)
    for name, value in settings.pop("model", {}).items():
        setattr(model.config, name, value)
    trainer = make_trainer(output_dir, rows, model=model, tokenizer=TOKENIZER, share_prompts=share, **settings)
    before = {name: weight.detach().clone().double() for name, weight in trainer.model.named_parameters()}
    given = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal given
        given += inputs[0].numel()

    trainer.model.get_input_embeddings().register_forward_hook(count)
    trainer.train()
    update = torch.cat([(p.double() - before[n]).flatten() for n, p in trainer.model.named_parameters()])
    logged = {name: value for name, value in trainer.state.log_history[0].items() if "time" not in name}
    return update, logged, given


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")  # one of the settings
@pytest.mark.parametrize("name", SETTINGS)
def test_sharing_gives_the_update_and_the_metrics_of_separate_rows(tmp_path, name):
    with free_attention():
        found, logged, given = trained(tmp_path / "shared", share=True, **SETTINGS[name])
    wanted, logged_apart, given_apart = trained(tmp_path / "apart", share=False, **SETTINGS[name])
    if name not in ("accumulated 1 x 9", "packed, accumulated"):  # nothing to share, or not always
        assert given < 0.85 * given_apart
    assert wanted.norm() > 0.05
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert logged == pytest.approx(logged_apart, rel=1e-5, abs=1e-7)


# Two rows a prompt in each of three micro-batches.
IN_PAIRS = {"share_prompts": True, "train_sampling_strategy": "sequential"}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("family", "chat"),
    [("llama", False), ("llama", True), ("qwen2", False), ("gpt_neox", True), ("gemma2", False), ("granite", False)],
)
def test_loss_and_gradients_equal_the_formula(tmp_path, family, lora, chat):
    rows = sharing(make_rows(6, seed=1, chat=chat), each=2)
    with free_attention():
        assert_equals_the_formula(tmp_path, rows, family, lora, {}, **IN_PAIRS)


@pytest.mark.parametrize(
    ("vocabulary", "name"),
    [("splitting", "half points to 10"), ("merging", "words"), ("splitting", "words"), ("mistral", "1 to 10")],
)
def test_with_branches_it_equals_one_forward_per_score(tmp_path, vocabularies, vocabulary, name):
    # Rows, and the branches of their scores, in one tree; three tokenizers.
    tokenizer, grid = vocabularies[vocabulary], GRIDS[name]
    rows = sharing(make_grid_rows(grid, 4), each=2)
    model = make_model(vocab=len(tokenizer))
    settings = {**settings_of(grid), "share_prompts": True, "rationale_weight": 0.0}
    trainer = make_trainer(tmp_path, rows, model=model, tokenizer=tokenizer, **settings)
    assert trainer.scales[0].grid.paths
    with free_attention():
        loss = loss_of(trainer)
    loss.backward()
    reference = make_model(vocab=len(tokenizer)).double()
    wanted = oracle(reference, tokenizer, grid, rows, False)
    wanted.backward()
    torch.testing.assert_close(loss.detach().double(), wanted.detach(), rtol=1e-5, atol=0)
    assert_same_gradients(gradients(trainer.model), gradients(reference))


def see_siblings(layout: Layout) -> Layout:
    return replace(layout, ends=np.full_like(layout.ends, layout.ends.shape[1]))


def be_one_further(layout: Layout) -> Layout:
    positions = layout.positions.copy()
    positions.flat[layout.places[0][5]] += 1
    return replace(layout, positions=positions)


def stand_in_for_another(layout: Layout) -> Layout:
    # A token of the second row is taken for the one in its place in the first: once too often there, and never here.
    one, other = layout.places[:2]
    places = other.copy()
    last = min(len(one), len(other)) - 3
    places[last] = one[last]
    return replace(layout, places=[one, places, *layout.places[2:]])


@pytest.mark.parametrize("broken", [see_siblings, be_one_further, stand_in_for_another])
def test_a_broken_tree_is_far_beyond_the_bound(tmp_path, monkeypatch, broken):
    def laid_out(*args: Any, **kwargs: Any) -> Any:
        layout, cost = lay_out(*args, **kwargs)
        return broken(layout), cost

    monkeypatch.setattr(branches, "lay_out", laid_out)
    monkeypatch.setattr("trl_tract.training.trainer.why_not_one_forward", lambda model: None)  # it would notice
    with free_attention():
        found, _, _ = trained(tmp_path / "shared", share=True)
    wanted, _, _ = trained(tmp_path / "apart", share=False)
    assert (found - wanted).norm() > 1e-3 * wanted.norm()


MEANS = ("eval_loss", "eval_score", "eval_entropy", "eval_mean_token_accuracy")


def test_an_evaluation_has_the_metrics_and_predictions_of_separate_rows(tmp_path):
    found = []
    for share in (True, False):
        trainer = make_trainer(tmp_path, NINE, tokenizer=TOKENIZER, eval_dataset=NINE, share_prompts=share)
        with free_attention():
            metrics = {
                name: value
                for name, value in trainer.evaluate().items()
                if name.startswith(("eval_loss", "eval_score", "eval_e", "eval_mean"))
            }
            found.append((metrics, trainer.predict(Dataset.from_list(NINE)).predictions))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)


def test_rows_that_share_nothing_go_the_old_way(tmp_path):
    rows = [{**row, "prompt": f"{i} {row['prompt']}"} for i, row in enumerate(make_rows(9))]
    given = [trained(tmp_path, share=share, rows=lambda _: rows)[2] for share in (True, False)]
    assert given[0] == given[1]


def test_a_model_that_takes_no_tree_trains_on_separate_rows(tmp_path, monkeypatch):
    refused = []
    monkeypatch.setattr(
        "trl_tract.training.trainer.why_not_one_forward",
        lambda model: refused.append(model) or "it was told not to",
    )
    found, _, given = trained(tmp_path / "shared", share=True)
    wanted, _, given_apart = trained(tmp_path / "apart", share=False)
    assert len(refused) == 1
    assert given == given_apart
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("refusal", "dropout", "settings", "told"),
    [
        (None, 0.0, {}, 0),
        ("it was told not to", 0.0, {}, 1),
        (None, 0.05, {}, 1),
        (None, 0.0, {"per_device_train_batch_size": 1}, 1),
        (None, 0.0, {"per_device_train_batch_size": 1, "packing": True}, 0),
    ],
)
def test_what_keeps_rows_from_sharing_is_told(tmp_path, refusal, dropout, settings, told):
    args = TRACTConfig(str(tmp_path), bf16=False, **settings)
    assert len(sharing_warnings(refusal, LoraConfig(lora_dropout=dropout), args)) == told


# Batches

MANY = [
    {"input_ids": [question] * 128 + [prompt] * 9 + [9] * rationale, "labels": [-100] * 137 + [9] * rationale,
     "prompt": (question, prompt)}
    for question in range(5) for prompt in range(100, 105) for rationale in (1, 2, 3, 4)
]  # fmt: skip


def batches_of(rows: list[dict[str, Any]], size: int, *, questions: bool, epoch: int = 0) -> list[list[int]]:
    sampler = SharingSampler(beginnings(Dataset.from_list(rows), questions=questions), size, seed=1)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(rows)))
    return [order[at : at + size] for at in range(0, len(order), size)]


@pytest.mark.parametrize("questions", [False, True])
@pytest.mark.parametrize("size", [4, 8, 12])
def test_the_rationales_of_a_prompt_stand_in_one_batch(questions, size):
    batches = batches_of(MANY, size, questions=questions)
    for batch in batches:
        prompts = [MANY[row]["prompt"] for row in batch]
        assert all(prompts.count(prompt) == 4 for prompt in prompts)


def test_a_prompt_with_more_rows_than_a_batch_fills_whole_ones():
    batches = batches_of(MANY[:4] * 5 + MANY[4:8], 8, questions=False)
    assert sorted(len({MANY[row % 4]["prompt"] if row < 20 else 0 for row in batch}) for batch in batches) == [1, 1, 2]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(2, 8), st.integers(0, 3))
def test_every_row_is_in_one_batch_and_the_last_alone_is_short(sizes, size, epoch):
    keys = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)[:, None]
    sampler = SharingSampler(keys, size, seed=0)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(sum(sizes)))
    # No more prompts are parted than batches end.
    parted = sum(
        len({at // size for at, row in enumerate(order) if keys[row, 0] == prompt}) > -(-count // size)
        for prompt, count in enumerate(sizes)
    )
    assert parted <= -(-len(order) // size)


def test_on_request_the_rows_of_a_question_stand_in_one_batch():
    alone, together = (
        np.mean([len({MANY[row]["prompt"][0] for row in batch}) for batch in batches_of(MANY, 20, questions=questions)])
        for questions in (False, True)
    )
    assert together == 1
    assert alone > 2


def test_an_update_of_several_batches_mixes_questions():
    # 13 batches of 8 rows, mostly of one question each; an update has 4 of them.
    batches = batches_of(MANY, 8, questions=True)
    updates = [[MANY[row]["prompt"][0] for batch in batches[at : at + 4] for row in batch] for at in range(0, 12, 4)]
    assert all(len(set(update)) >= 3 for update in updates)


def test_each_epoch_has_its_own_order_and_the_same_again():
    assert batches_of(MANY, 8, questions=True) == batches_of(MANY, 8, questions=True)
    assert batches_of(MANY, 8, questions=True) != batches_of(MANY, 8, questions=True, epoch=1)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("size", [4, 3])
def test_a_training_that_goes_on_has_the_batches_of_one_that_did_not_stop(tmp_path, size):
    settings = {"per_device_train_batch_size": size, "num_train_epochs": 2, "share_prompts": True}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    rows = sharing(make_rows(12))

    def trainer(name: str) -> Any:
        return make_trainer(tmp_path / name, rows, model=make_model(std=0.05), tokenizer=TOKENIZER, **settings)

    whole, half, rest = trainer("whole"), trainer("stopped"), trainer("stopped")
    whole.train()
    half.add_callback(StopAt(12 // size + 1))
    half.train()
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 24 // size
    assert half.state.global_step == 12 // size + 1
    for name, weight in rest.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name])


def two_epochs(output_dir: Path, accumulation: int) -> torch.Tensor:
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "share_batches": "prompt",
    }
    settings |= {"rows": lambda _: sharing(make_rows(12), each=2), "max_steps": -1, "num_train_epochs": 2}
    return trained(output_dir, share=True, **settings)[0].detach()


@pytest.mark.process
def test_two_ranks_have_the_batches_that_one_accumulates(tmp_path, two_ranks):
    # Another order in each epoch, and the same one on both ranks.
    wanted = two_epochs(tmp_path / "alone", 2)
    for found in two_ranks(two_epochs, tmp_path / "ranks", 1):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("generations", "training", "shares"),
    [
        (4, {}, True),
        (4, {"share_prompts": None}, True),
        (1, {}, False),
        (4, {"share_prompts": False}, False),
        (1, {"share_prompts": True}, True),
        (4, {"per_device_train_batch_size": 1}, False),
        (4, {"neftune_noise_alpha": 5.0}, False),
    ],
)
def test_stage_two_shares_where_a_prompt_has_several_rationales(generations, training, shares):
    spec = RunSpec("model", "rows.jsonl", training=training, num_generations=generations)
    assert spec.stage_two_training["share_prompts"] is shares
