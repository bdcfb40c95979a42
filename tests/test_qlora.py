"""QLoRA for real, on a CPU: nf4 weights with double quantisation, LoRA on top, and the judge that comes out."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import PLAIN, make_model, make_rows, make_tokenizer, save_seed, sharing
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from test_options import gradient_of, oracle_terms
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_tract import CoTRAILJudge, TRACTConfig, TRACTTrainer, TransformersBackend

TOKENIZER = make_tokenizer()
ROWS = make_rows(8, seed=1)
LEARNING_RATE = 0.5


def lora_config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def seed_model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("seed")
    save_seed(directory, std=0.1)
    return directory


def nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def qlora_trainer(
    seed_model: Path, output_dir: Path, compute_dtype: torch.dtype, rows: Any = ROWS, **settings: Any
) -> TRACTTrainer:
    settings = {"max_steps": 2, "learning_rate": LEARNING_RATE, "train_sampling_strategy": "sequential", **settings}
    return TRACTTrainer(
        str(seed_model),
        args=TRACTConfig(str(output_dir), **{**PLAIN, **settings}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        quantization_config=nf4(compute_dtype),
        peft_config=lora_config(),
    )


@pytest.fixture(scope="module", autouse=True)
def weights_stay_as_they_were_quantised():
    """On every CPU: with AVX512-BF16, bitsandbytes packs weights anew in evaluation and rounds their scales."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield


def quantised(model: Any) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def dequantised(model: Any) -> Any:
    """The same judge without quantisation: each nf4 weight written out, adapters as they are, all in float64."""
    plain = get_peft_model(make_model(std=0.1), lora_config())
    weights = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    for name, module in quantised(model).items():
        weights[f"{name}.weight"] = dequantize_4bit(module.weight.data, module.weight.quant_state)
    plain.load_state_dict({name: weights[name].double() for name in plain.state_dict()})
    return plain.double()


def loss_of(plain: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    nll, _, errors = oracle_terms(plain, rows)
    return nll.mean() + errors.mean()


def loss_by_hand(model: Any) -> float:
    with torch.no_grad():
        return loss_of(dequantised(model), ROWS).item()


def loss_after_two_steps_by_hand(model: Any) -> float:
    """Two steps of plain gradient descent on the adapters, four rows each, in float64."""
    plain = dequantised(model)
    for rows in (ROWS[:4], ROWS[4:]):
        for name, gradient in gradient_of(loss_of(plain, rows), plain).items():
            plain.get_parameter(name).data -= LEARNING_RATE * gradient
    with torch.no_grad():
        return loss_of(plain, ROWS).item()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def run(request, seed_model, tmp_path_factory) -> dict[str, Any]:
    """Two steps, and the evaluation before and after them, beside the same by hand."""
    trainer = qlora_trainer(seed_model, tmp_path_factory.mktemp("run"), request.param, per_device_eval_batch_size=8)
    found, wanted = [trainer.evaluate()["eval_loss"]], [loss_by_hand(trainer.model)]
    descended = loss_after_two_steps_by_hand(trainer.model)
    steps = trainer.train().global_step
    found.append(trainer.evaluate()["eval_loss"])
    wanted.append(loss_by_hand(trainer.model))
    told = {"found": found, "wanted": wanted, "steps": steps, "descended": descended}
    return {"dtype": request.param, "trainer": trainer, **told}


def test_every_linear_layer_but_the_head_is_nf4_with_double_quantisation(run):
    layers = quantised(run["trainer"].model)
    assert len(layers) == 14  # q, k, v, o, gate, up, down in each of two layers
    assert all(
        layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers.values()
    )


def test_the_loss_is_that_of_the_dequantised_weights(run):
    # Adapters start at zero, so this is the quantised base alone.
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[run["dtype"]]
    assert run["found"][0] == pytest.approx(run["wanted"][0], rel=bound)


def test_the_loss_after_training_is_that_of_the_dequantised_weights_with_the_adapters(run):
    # TRL keeps adapters in bfloat16: their products are rounded to 8 bits whatever the compute dtype.
    bound = {torch.float32: 2e-3, torch.bfloat16: 1e-2}[run["dtype"]]
    assert run["found"][1] == pytest.approx(run["wanted"][1], rel=bound)


def test_two_steps_lower_the_loss_as_much_as_two_by_hand(run):
    # How far they lower it depends on where the adapters start, and so on the versions of torch and PEFT.
    assert run["steps"] == 2
    by_hand = run["wanted"][0] - run["descended"]
    assert by_hand > 0.1
    assert run["found"][0] - run["found"][1] == pytest.approx(by_hand, rel=0.01)


def test_every_adapter_has_been_trained_and_nothing_else(run):
    trained = {name: p for name, p in run["trainer"].model.named_parameters() if p.requires_grad}
    assert len(trained) == 28  # A and B on each quantised layer
    assert all("lora" in name for name in trained)
    assert all(p.any() for name, p in trained.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    run["trainer"].save_model(str(directory))
    return directory


def test_rows_that_share_a_prompt_train_like_separate_rows(seed_model, tmp_path):
    rows = sharing(ROWS, each=4)
    losses = []
    for share in (True, False):
        trainer = qlora_trainer(seed_model, tmp_path, torch.float32, rows=rows, share_prompts=share, max_steps=1)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1]  # rounded in another order: they have been computed in another way


def test_the_saved_adapter_judges_on_its_base_in_full_precision(run, saved):
    judge = CoTRAILJudge.from_pretrained(str(saved), append_marker=True, max_new_tokens=4, max_attempts=1)
    (judgement,) = judge.judge([{"prompt": ROWS[0]["prompt"]}])
    assert judgement.error is None
    assert math.isfinite(judgement.score)
    assert not quantised(judge.backend.model)
    weights = judge.backend.model.state_dict()
    trained = {name: value for name, value in run["trainer"].model.state_dict().items() if "lora" in name}
    assert all(torch.equal(weights[name].float(), value.float()) for name, value in trained.items())


def test_the_saved_adapter_judges_on_a_base_loaded_in_4_bits_as_the_trainer_evaluates(run, saved, seed_model):
    base = AutoModelForCausalLM.from_pretrained(seed_model, quantization_config=nf4(run["dtype"]))
    backend = TransformersBackend(PeftModel.from_pretrained(base, str(saved)), TOKENIZER)
    grid = run["trainer"].judge_config.scales[0].grid
    row = ROWS[0]
    ids = TOKENIZER(row["prompt"] + row["completion"]).input_ids[:-1]
    log_probs = torch.as_tensor(backend.next_token_logprobs([ids], grid.token_ids))[0]
    expected = (log_probs.double().exp() * torch.tensor(grid.values).double()).sum().item()
    alone = run["trainer"].evaluate(Dataset.from_list([row]))["eval_score/expected"]
    bound = {torch.float32: 1e-3, torch.bfloat16: 2e-2}[run["dtype"]]
    assert expected == pytest.approx(alone, rel=bound)


# The page about it

PAGE = (Path(__file__).parents[1] / "docs" / "training_options.md").read_text(encoding="utf-8")
(RECIPE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_the_recipe_in_the_documentation_trains(tmp_path, seed_model):
    replaced = RECIPE.replace("meta-llama/Llama-3.1-8B-Instruct", str(seed_model)).replace(
        '"judge"', repr(str(tmp_path / "judge"))
    )
    namespace: dict[str, Any] = {"rows": Dataset.from_list(ROWS)}
    exec(replaced, namespace)
    assert namespace["trainer"].state.global_step > 0
    assert {p.dtype for p in namespace["trainer"].model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert (tmp_path / "judge" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "judge" / "tract_config.json").is_file()
