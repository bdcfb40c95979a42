"""REALTrainer's gradient is that of the expected squared error: on a model whose rationales can all be written down.

The oracle in `enumerable.py` sums over every continuation and leaves the derivative to autograd. What is left of a
difference are the 32 bits in which TRL computes log-probabilities.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from enumerable import (
    END,
    GOLD,
    MOST,
    PENALTY,
    PROMPT,
    SETTINGS,
    enumerable_model,
    enumerable_tokenizer,
    expected_loss,
    gradient,
    probabilities,
    sequences,
)
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from trl_tract import REALConfig, REALTrainer
from trl_tract.training.rollouts import grouped

TOKENIZER = enumerable_tokenizer()
IDS = TOKENIZER(PROMPT)["input_ids"]
ONE_TOKEN = {"1": 1.0, "2": 2.0}
TWO_TOKENS = {"11": 1.0, "12": 2.0, "21": 3.0, "22": 4.0}
LOSS_TYPES = ["dapo", "dr_grpo", "luspo", "grpo", "bnpo", "sapo", "cispo"]

pytestmark = pytest.mark.filterwarnings("ignore:.*luspo.*")


def make(output_dir: Path, model: Any, rows: list[dict[str, Any]], **settings: Any) -> Any:
    settings = {**SETTINGS, **({"epsilon_high": 5.0} if settings.get("loss_type") == "cispo" else {}), **settings}
    args = REALConfig(str(output_dir), **settings)
    return REALTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=TOKENIZER)


def with_adapter(model: Any) -> Any:
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model.double()


def enumerated(
    output_dir: Path, model: Any, grid: dict[str, float], gold: float, **settings: Any
) -> tuple[Any, torch.Tensor, float]:
    """Trainer, gradient of its loss over every continuation once, and the tokens that were sampled for each.

    Each stands for the share of samples that it would have: its advantage and its importance ratio are N times its
    probability, and no baseline is needed.
    """
    count = len(sequences())
    row = {"prompt": PROMPT, "score": gold}
    many = {"per_device_train_batch_size": count, "num_generations": count, "vllm_importance_sampling_clip_max": None}
    own = {"score_values": list(grid.values()), "score_texts": list(grid)}
    trainer = make(output_dir, model, [row], **many, **own, **settings)
    trainer._generate_single_turn = lambda *args, **kwargs: ([list(each) for each in sequences()], None)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions([row] * count)
    weights = count * probabilities(model, IDS)
    inputs["advantages"] = torch.tensor(trainer._logs["rewards"]["squared_error"], dtype=torch.float64) * weights
    inputs["importance_sampling_ratio"] = weights[:, None]
    found = gradient(model, trainer.compute_loss(trainer.model, inputs))
    return trainer, found, float((inputs["completion_mask"] * inputs["tool_mask"]).sum()) / count


def test_padding_in_front_of_a_prompt_does_not_change_log_probabilities(tmp_path):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.4}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=6, pad_token_id=END, eos_token_id=END, bos_token_id=None, **sizes)
    model = GPT2LMHeadModel(config).eval()
    trainer = make(tmp_path, model, [{"prompt": PROMPT, "score": GOLD}], num_generations=4)
    row = torch.tensor([[*IDS, 2, 3, 4]])
    padded = torch.nn.functional.pad(row, (5, 0), value=END)
    mask = torch.nn.functional.pad(torch.ones_like(row), (5, 0))
    alone, *_ = trainer._get_per_token_logps_and_entropies(model, row, torch.ones_like(row), 3)
    found, *_ = trainer._get_per_token_logps_and_entropies(model, padded, mask, 3)
    torch.testing.assert_close(found, alone)


@functools.cache
def oracle(
    grid: tuple[tuple[str, float], ...], gold: float, gold_weight: float = 0.0, std: float = 0.2
) -> torch.Tensor:
    model = enumerable_model(std)
    return gradient(model, expected_loss(model, IDS, gold, dict(grid), gold_weight=gold_weight))


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_every_continuation_is_listed():
    assert float(probabilities(enumerable_model(), IDS).sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_both_terms_are_the_gradient_of_the_expected_squared_error(tmp_path, loss_type):
    _, found, length = enumerated(tmp_path, enumerable_model(), ONE_TOKEN, GOLD, loss_type=loss_type)
    # The whole loss is divided by a number of tokens, and by the same for all rationales.
    divided = {"luspo": 1.0, "dr_grpo": MOST}.get(loss_type, length)
    assert distance(found * divided, oracle(tuple(ONE_TOKEN.items()), GOLD)) < 1e-6


def test_the_gradient_with_importance_ratios_of_sequences(tmp_path):
    _, found, length = enumerated(
        tmp_path, enumerable_model(), ONE_TOKEN, GOLD, loss_type="grpo", importance_sampling_level="sequence"
    )
    assert distance(found * length, oracle(tuple(ONE_TOKEN.items()), GOLD)) < 1e-6


def test_the_gradient_with_the_likelihood_of_a_fractional_gold_score(tmp_path):
    _, found, length = enumerated(tmp_path, enumerable_model(), ONE_TOKEN, GOLD, gold_weight=0.3)
    assert distance(found * length, oracle(tuple(ONE_TOKEN.items()), GOLD, 0.3)) < 1e-6


@pytest.mark.parametrize("gold_weight", [0.0, 0.3])
def test_the_gradient_with_scores_of_several_tokens(tmp_path, gold_weight):
    _, found, length = enumerated(tmp_path, enumerable_model(), TWO_TOKENS, 2.6, gold_weight=gold_weight)
    assert distance(found * length, oracle(tuple(TWO_TOKENS.items()), 2.6, gold_weight)) < 1e-6


def test_the_gradient_of_an_adapter(tmp_path):
    model = with_adapter(enumerable_model())
    wanted = gradient(model, expected_loss(model, IDS, GOLD, ONE_TOKEN))
    _, found, length = enumerated(tmp_path, model, ONE_TOKEN, GOLD)
    assert distance(found * length, wanted) < 1e-6


def given(output_dir: Path, **settings: Any) -> torch.Tensor:
    """Weights after one update on rationales that are given: of each of 16 prompts four, of unequal lengths."""
    model = enumerable_model()
    rows = [{"prompt": "a" * (1 + number % 3) + "12"[number % 2], "score": 1 + number / 16} for number in range(16)]
    trainer = make(output_dir, model, rows, num_generations=4, shuffle_dataset=False, **settings)
    everything = sequences()

    def generate(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        # By the row and the place in its group, whatever batch and rank it is in.
        numbers = [round(16 * (gold - 1)) * 4 + place % 4 for place, gold in enumerate(trainer._golds)]
        return [list(everything[(7 * number) % len(everything)]) for number in numbers], None

    trainer._generate_single_turn = generate
    trainer.train()
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "luspo"])
def test_accumulation_does_not_change_the_update(tmp_path, loss_type):
    whole = given(tmp_path, loss_type=loss_type, per_device_train_batch_size=64)
    parts = given(tmp_path, loss_type=loss_type, per_device_train_batch_size=16, gradient_accumulation_steps=4)
    start = torch.cat([weight.detach().flatten() for weight in enumerable_model().parameters()])
    assert distance(parts - start, whole - start) < 1e-5


@pytest.mark.parametrize("accumulation", [1, 4])
def test_shared_prompts_do_not_change_the_update(tmp_path, accumulation):
    batch = {"per_device_train_batch_size": 64 // accumulation, "gradient_accumulation_steps": accumulation}
    whole = given(tmp_path, **batch)
    shared = given(tmp_path, share_prompts=True, **batch)
    start = torch.cat([weight.detach().flatten() for weight in enumerable_model().parameters()])
    assert distance(shared - start, whole - start) < 1e-5


def test_micro_batches_hold_whole_groups_where_prompts_are_shared():
    rows = torch.tensor([2, 0, 1, 0, 2, 1])
    batches = [{"group": rows[:3], "of": torch.tensor(5)}, {"group": rows[3:], "of": torch.tensor(5)}]
    assert [batch["group"].tolist() for batch in grouped(batches)] == [[2, 2, 0], [0, 1, 1]]


@pytest.mark.process
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_two_ranks_make_the_update_of_one(tmp_path, two_ranks, loss_type):
    whole = given(tmp_path / "one", loss_type=loss_type, per_device_train_batch_size=64)
    start = torch.cat([weight.detach().flatten() for weight in enumerable_model().parameters()])
    settings = {"loss_type": loss_type, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    for rank in two_ranks(functools.partial(given, **settings), tmp_path / "two"):
        assert distance(rank - start, whole - start) < 1e-5


# Its gradient stands out further from the noise of sampling: 0.02 off with 8,192 rationales.
WIDER = 0.4


def sampled(output_dir: Path, *, num_generations: int, batch: int, accumulation: int) -> torch.Tensor:
    """The update that the trainer makes of 8,192 rationales that it samples itself."""
    model = enumerable_model(WIDER)
    before = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    rows = [{"prompt": PROMPT, "score": GOLD}] * (8192 // num_generations)
    trainer = make(
        output_dir,
        model,
        rows,
        num_generations=num_generations,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        loss_type="luspo",
        seed=3,
    )
    trainer.train()
    return before - torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(("num_generations", "accumulation"), [(8, 1), (8, 4), (2, 1), (2, 4)])
def test_sampled_rationales_give_the_gradient(tmp_path, num_generations, accumulation):
    found = sampled(tmp_path, num_generations=num_generations, batch=8192 // accumulation, accumulation=accumulation)
    assert distance(found, oracle(tuple(ONE_TOKEN.items()), GOLD, std=WIDER)) < 0.04


@pytest.mark.slow
@pytest.mark.process
def test_two_ranks_that_sample_give_the_gradient(tmp_path, two_ranks):
    sample = functools.partial(sampled, num_generations=8, batch=1024, accumulation=4)
    for found in two_ranks(sample, tmp_path):
        assert distance(found, oracle(tuple(ONE_TOKEN.items()), GOLD, std=WIDER)) < 0.04


def test_a_rationale_without_a_marker_earns_the_penalty_and_is_counted(tmp_path):
    trainer, _, _ = enumerated(tmp_path, enumerable_model(), ONE_TOKEN, GOLD)
    without = [each for each in sequences() if each[-1] != 5]
    rewards = torch.tensor(trainer._logs["rewards"]["squared_error"])
    assert int((rewards == -torch.tensor(PENALTY)).sum()) == len(without)
    share = trainer._rollout_metrics["train"].means()["rationale/no_score"]
    assert share == pytest.approx(len(without) / len(sequences()))
