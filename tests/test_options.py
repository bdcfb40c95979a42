"""What TRACTTrainer does under the training options of its hosts: the same update, a stated change, or a refusal."""

import functools
import logging
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.sft_trainer
from conftest import make_model, make_rows, make_tokenizer, make_trainer
from peft import LoraConfig
from test_oracle import oracle_row
from transformers import TrainerCallback

from trl_tract import TRACTConfig, TRACTTrainer

TOKENIZER = make_tokenizer()
GRID_IDS = TOKENIZER.convert_tokens_to_ids(["1", "2", "3", "4", "5"])
VALUES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)


def lora_config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


# One step, and the formula it is held to


def one_step(output_dir: Path, rows: Any, **settings: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one step on rows in their order; the gradient is read off the update of plain SGD."""
    settings = {"train_sampling_strategy": "sequential", "learning_rate": 1.0, "max_steps": 1, **settings}
    trainer = make_trainer(output_dir, rows, tokenizer=TOKENIZER, **settings)
    before = {name: p.detach().double() for name, p in trainer.model.named_parameters() if p.requires_grad}
    loss = trainer.train().training_loss
    after = dict(trainer.model.named_parameters())
    return loss, {name: value - after[name].detach().double() for name, value in before.items()}


def vector(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in gradient.values()])


def relative_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    assert vector(wanted).norm() > 1e-2  # far above what float32 rounds away in the weights
    return ((vector(found) - vector(wanted)).norm() / vector(wanted).norm()).item()


def oracle_model(family: str = "llama", std: float = 0.4) -> Any:
    model = make_model(family, std=std).double()
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def oracle_terms(model: Any, rows: Iterable[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nats of each rationale token, log-probabilities `(N, V)` there, squared errors `(S,)`, a row at a time."""
    nll, distributions, errors = [], [], []
    for row in rows:
        ids, prompt_length, (score_index,) = oracle_row(row)
        log_probs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(dim=-1)
        for t in range(prompt_length, len(ids)):
            if t != score_index:
                nll.append(-log_probs[t - 1, ids[t]])  # the token at t is predicted at t - 1
                distributions.append(log_probs[t - 1])
        expected = log_probs[score_index - 1].exp()[GRID_IDS] @ VALUES
        errors.append((expected - row["score"]) ** 2)
    return torch.stack(nll), torch.stack(distributions), torch.stack(errors)


def gradient_of(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


# Mixtures of experts


def balance(router_logits: torch.Tensor, chosen: int) -> torch.Tensor:
    """Load balance of E experts over tokens `(T, E)`: E * sum_e (share of tokens sent to e) * (mean probability of e).

    Source: Fedus et al. 2022, equations 4 to 6, https://arxiv.org/abs/2101.03961
    """
    probs = router_logits.softmax(dim=-1)
    sent = torch.zeros_like(probs).scatter(1, probs.topk(chosen, dim=-1).indices, 1.0)
    return probs.shape[1] * (sent.mean(dim=0) * probs.mean(dim=0)).sum()


def balance_of_rows(model: Any, rows: Iterable[dict[str, Any]]) -> torch.Tensor:
    """The load balance of one batch of rows, from what comes into the routers of all layers."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]) @ module.weight.T)

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    assert len(routers) == model.config.num_hidden_layers
    hooks = [router.register_forward_hook(keep) for router in routers]
    for row in rows:
        model(input_ids=torch.tensor([oracle_row(row)[0]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return balance(torch.cat(seen), model.config.num_experts_per_tok)


def moe_oracle(model: Any, batches: list[list[dict[str, Any]]], rationale_weight: float, coef: float) -> torch.Tensor:
    """The balance is a mean over micro-batches, the other two are over all rows."""
    nll, _, errors = oracle_terms(model, [row for batch in batches for row in batch])
    aux = torch.stack([balance_of_rows(model, batch) for batch in batches]).mean()
    return rationale_weight * nll.mean() + errors.mean() + coef * aux


@pytest.mark.parametrize("rationale_weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_rationale_weight_leaves_the_load_balance_of_experts_whole(tmp_path, family, rationale_weight):
    rows = make_rows(6, seed=1)
    loss, gradient = one_step(
        tmp_path,
        rows,
        model=make_model(family),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        rationale_weight=rationale_weight,
        router_aux_loss_coef=0.7,
    )
    oracle = oracle_model(family)
    wanted = moe_oracle(oracle, [rows[:2], rows[2:4], rows[4:]], rationale_weight, 0.7)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert relative_difference(gradient, gradient_of(wanted, oracle)) <= 1e-4


def test_evaluation_keeps_the_load_balance_whole(tmp_path):
    # Evaluation passes no counts: every mean is over the batch.
    rows = make_rows(5, seed=2)
    trainer = make_trainer(
        tmp_path,
        rows,
        model=make_model("qwen3_moe"),
        tokenizer=TOKENIZER,
        eval_dataset=rows,
        per_device_eval_batch_size=5,
        rationale_weight=0.25,
        router_aux_loss_coef=0.7,
    )
    with torch.no_grad():
        wanted = moe_oracle(oracle_model("qwen3_moe"), [rows], 0.25, 0.7)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_a_coefficient_of_zero_turns_the_load_balance_off(tmp_path):
    rows = make_rows(4, seed=1)
    loss, _ = one_step(tmp_path, rows, model=make_model("mixtral"), rationale_weight=0.5, router_aux_loss_coef=0.0)
    nll, _, errors = oracle_terms(oracle_model("mixtral"), rows)
    assert loss == pytest.approx((0.5 * nll.mean() + errors.mean()).item(), rel=1e-5)


# Other losses of the rationale


@pytest.mark.parametrize("rationale_weight", [1.0, 0.5])
def test_dft_weighs_each_rationale_token_by_its_own_probability(tmp_path, rationale_weight):
    # Wu et al. 2025, https://arxiv.org/abs/2508.05629: nll * stop_gradient(p).
    rows = make_rows(6, seed=1)
    loss, gradient = one_step(
        tmp_path,
        rows,
        model=make_model(std=0.1),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        loss_type="dft",
        rationale_weight=rationale_weight,
    )
    oracle = oracle_model(std=0.1)
    nll, _, errors = oracle_terms(oracle, rows)
    wanted = rationale_weight * (nll * (-nll).exp().detach()).mean() + errors.mean()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert relative_difference(gradient, gradient_of(wanted, oracle)) <= 1e-4


def test_dft_leaves_the_score_term_alone(tmp_path):
    rows = make_rows(6, seed=1)
    settings = {"per_device_train_batch_size": 6, "rationale_weight": 0.0}
    loss, gradient = one_step(tmp_path / "dft", rows, loss_type="dft", **settings)
    plain_loss, plain_gradient = one_step(tmp_path / "nll", rows, **settings)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert relative_difference(gradient, plain_gradient) <= 1e-5


costs_a_second_forward_pass = pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")


def smoothed(nll: torch.Tensor, distributions: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with a tenth of the target spread over the vocabulary."""
    return 0.9 * nll.mean() - 0.1 * distributions.mean()


@costs_a_second_forward_pass
def test_label_smoothing_smooths_the_rationale_and_not_the_score(tmp_path):
    rows = make_rows(6, seed=1)
    loss, gradient = one_step(
        tmp_path,
        rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        label_smoothing_factor=0.1,
        rationale_weight=0.5,
    )
    oracle = oracle_model()
    nll, distributions, errors = oracle_terms(oracle, rows)
    wanted = 0.5 * smoothed(nll, distributions) + errors.mean()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert relative_difference(gradient, gradient_of(wanted, oracle)) <= 1e-4


@costs_a_second_forward_pass
def test_label_smoothing_keeps_the_load_balance_of_experts(tmp_path):
    # SFTTrainer drops it there.
    rows = make_rows(4, seed=1)
    loss, _ = one_step(
        tmp_path,
        rows,
        model=make_model("mixtral"),
        label_smoothing_factor=0.1,
        rationale_weight=0.5,
        router_aux_loss_coef=0.7,
    )
    oracle = oracle_model("mixtral")
    nll, distributions, errors = oracle_terms(oracle, rows)
    wanted = 0.5 * smoothed(nll, distributions) + errors.mean() + 0.7 * balance_of_rows(oracle, rows)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)


def test_both_terms_feel_the_same_embedding_noise(tmp_path):
    # The oracle reads plain logits of the same padded batch under the same seed, so it draws the same noise.
    rows = make_rows(4, seed=1)

    class Seed(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.manual_seed(5)

    settings = {"neftune_noise_alpha": 5.0, "learning_rate": 0.0, "max_steps": 1, "extra": {"callbacks": [Seed()]}}
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, train_sampling_strategy="sequential", **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.train().training_loss

    model = make_model()
    torch.manual_seed(5)
    embeddings = model.get_input_embeddings()(batch["input_ids"])  # (B, L, H)
    bound = 5.0 / (embeddings.shape[1] * embeddings.shape[2]) ** 0.5
    noisy = embeddings + torch.zeros_like(embeddings).uniform_(-bound, bound)
    logits = model(inputs_embeds=noisy, attention_mask=batch["attention_mask"], use_cache=False).logits
    log_probs = logits.double().log_softmax(dim=-1)
    nll, errors = [], []
    for i, row in enumerate(rows):
        ids, prompt_length, (score_index,) = oracle_row(row)
        nll += [-log_probs[i, t - 1, ids[t]] for t in range(prompt_length, len(ids)) if t != score_index]
        errors.append((log_probs[i, score_index - 1].exp()[GRID_IDS] @ VALUES - row["score"]) ** 2)
    wanted = torch.stack(nll).mean() + torch.stack(errors).mean()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    quiet, _ = one_step(tmp_path / "quiet", rows)
    assert loss != pytest.approx(quiet, rel=1e-3)


# Options that may not change the update


def update(output_dir: Path, rows: Any = None, **settings: Any) -> dict[str, torch.Tensor]:
    """The sum of the gradients of three steps of four rows."""
    settings = {"model": make_model(std=0.05), "max_steps": 3, "learning_rate": 0.05, **settings}
    return one_step(output_dir, make_rows(12) if rows is None else rows, **settings)[1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[bool, dict[str, torch.Tensor]]:
    """By whether it is LoRA."""
    return {
        lora: update(tmp_path_factory.mktemp("plain"), **({"extra": {"peft_config": lora_config()}} if lora else {}))
        for lora in (False, True)
    }


# The name that TRL and its users write; transformers 5.23 has a new one.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated:FutureWarning")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_change_the_update(tmp_path, plain, lora, reentrant):
    settings: dict[str, Any] = {"extra": {"peft_config": lora_config()}} if lora else {}
    settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert relative_difference(update(tmp_path, **settings), plain[lora]) <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [{"torch_empty_cache_steps": 1}, {"average_tokens_across_devices": False}, {"auto_find_batch_size": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_it_does_not_change_the_update(tmp_path, plain, settings):
    assert relative_difference(update(tmp_path, **settings), plain[False]) <= 1e-5


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_the_order_of_rows_does_not_change_the_update_of_all_of_them(tmp_path, strategy):
    rows = make_rows(9, seed=3)
    settings = {"max_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    found = update(tmp_path / "ordered", rows, **settings, train_sampling_strategy=strategy)
    wanted = update(tmp_path / "plain", rows, max_steps=1, per_device_train_batch_size=9)
    assert relative_difference(found, wanted) <= 1e-5


def test_grouping_by_length_does_not_change_the_evaluation(tmp_path):
    # transformers reorders the evaluation set as well.
    settings = {"eval_dataset": make_rows(8, seed=4), "per_device_eval_batch_size": 3, "tokenizer": TOKENIZER}
    grouped = make_trainer(tmp_path, make_rows(4), train_sampling_strategy="group_by_length", **settings)
    order = list(grouped._get_eval_sampler(grouped.eval_dataset))
    assert order != sorted(order)
    found, wanted = grouped.evaluate(), make_trainer(tmp_path, make_rows(4), **settings).evaluate()
    for name in ("score/pearson", "score/spearman", "score/rmse", "score/mae", "loss/rationale"):
        assert found[f"eval_{name}"] == pytest.approx(wanted[f"eval_{name}"], rel=1e-5), name


def test_a_batch_that_does_not_fit_starts_again_with_a_smaller_one(tmp_path, monkeypatch):
    # 10 rows at once do not fit; transformers goes on with nine tenths of them.
    fits = TRACTTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = fits(self, model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > 9:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return loss

    rows = make_rows(18)
    wanted = update(tmp_path / "nine", rows, per_device_train_batch_size=9, max_steps=1)
    monkeypatch.setattr(TRACTTrainer, "compute_loss", compute_loss)
    found = update(tmp_path / "ten", rows, per_device_train_batch_size=10, max_steps=1, auto_find_batch_size=True)
    assert relative_difference(found, wanted) <= 1e-5


# Activation offloading


def test_offloading_without_an_accelerator_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no accelerator here"):
        TRACTConfig(str(tmp_path), activation_offloading=True)


@pytest.mark.parametrize("lora", [False, True])
def test_the_hooks_of_offloading_do_not_change_the_update(tmp_path, monkeypatch, plain, lora):
    # TRL's own hooks with the CPU in the accelerator's place: what is saved for the backward pass is copied out and in.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    on_cpu = functools.partial(
        trl.trainer.sft_trainer.get_act_offloading_ctx_manager, use_streams=False, use_pin_memory=False
    )
    offloaded: list[int] = []

    def counted(model: Any) -> Any:
        context = on_cpu(model)
        pack = context.pack_hook

        def pack_and_count(tensor: torch.Tensor) -> int:
            packed = pack(tensor)
            offloaded.append(int(context.tracker[packed][1]))
            return packed

        context.pack_hook = pack_and_count
        return context

    monkeypatch.setattr(trl.trainer.sft_trainer, "get_act_offloading_ctx_manager", counted)
    settings: dict[str, Any] = {"extra": {"peft_config": lora_config()}} if lora else {}
    found = update(tmp_path, activation_offloading=True, **settings)
    assert sum(offloaded) > 10
    assert relative_difference(found, plain[lora]) <= 1e-5


# torch.compile


# Rows padded to one length, so that shapes stay what they are.
SIX_STEPS = {"max_steps": 6, "pad_to_multiple_of": 64}


def compiled_update(output_dir: Path, backend: str, **grid: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The update of six compiled steps, and after each of them the number of functions compiled so far."""
    compiled: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            compiled.append(torch._dynamo.utils.counters["frames"]["total"])

    settings = {"torch_compile": True, "torch_compile_backend": backend, "extra": {"callbacks": [Count()]}, **grid}
    torch.compiler.reset()
    logging.disable(logging.DEBUG)  # a second or two of the compiler's traces, which pytest would collect
    try:
        return update(output_dir, make_rows(24), **SIX_STEPS, **settings), compiled
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own remarks on the code of torch and TRL that it traces
        return compiled_update(tmp_path_factory.mktemp("compiled"), "eager")


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_update(tmp_path, compiled):
    assert relative_difference(compiled[0], update(tmp_path, make_rows(24), **SIX_STEPS)) <= 1e-5


@pytest.mark.slow
def test_a_compiled_model_is_compiled_in_the_first_steps_and_not_in_every_one(compiled):
    # The score head hangs a new hook on the backbone at each call, which could make each call a new one to compile.
    counts = compiled[1]
    assert counts[0] > 0
    assert counts[-1] == counts[1]


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.slow
def test_a_compiled_model_gives_the_same_update_with_scores_of_several_tokens(tmp_path):
    # Half points: the branches change the shape of what is compiled, and bring a mask of their own.
    grid = {"score_values": [half / 2 for half in range(2, 11)]}
    found, counts = compiled_update(tmp_path / "compiled", "eager", **grid)
    assert counts[-1] > 0
    assert relative_difference(found, update(tmp_path / "plain", make_rows(24), **SIX_STEPS, **grid)) <= 1e-5


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++ on a CPU")
def test_a_model_compiled_by_inductor_gives_the_same_update(tmp_path):
    found, _ = compiled_update(tmp_path / "compiled", "inductor")
    assert relative_difference(found, update(tmp_path / "plain", make_rows(24), **SIX_STEPS)) <= 1e-5


# Liger

# TRL's: it will take kernels from the hub instead.
deprecated_by_trl = pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning")


@deprecated_by_trl
def test_ligers_own_loss_is_refused(tmp_path):
    settings = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        make_trainer(tmp_path, make_rows(4), **settings)


@deprecated_by_trl
def test_layers_replaced_when_training_starts_leave_the_score_head_in_place(tmp_path, monkeypatch, plain):
    # A stand-in for liger, whose kernels need a GPU: it replaces the norms' and MLPs' forward, at the same moment.
    configs: list[dict[str, Any]] = []

    def apply(model: Any, config: dict[str, Any]) -> None:
        configs.append(config)
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = functools.partial(
                    lambda m, x: torch.nn.functional.rms_norm(x, (x.shape[-1],), m.weight, m.variance_epsilon), module
                )

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    found = update(tmp_path, use_liger_kernel=True)
    assert configs == [{"fused_linear_cross_entropy": False}]
    assert relative_difference(found, plain[False]) <= 1e-5


# Evaluation


def test_compute_metrics_sees_all_logits_and_changes_no_other_metric(tmp_path):
    rows = make_rows(6, seed=4)
    shapes: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"mine": 1.0}

    settings = {"eval_dataset": rows, "tokenizer": TOKENIZER, "per_device_eval_batch_size": 6}
    wanted = make_trainer(tmp_path, make_rows(4), **settings).evaluate()
    trainer = make_trainer(tmp_path, make_rows(4), extra={"compute_metrics": metrics}, **settings)
    with pytest.warns(FutureWarning, match="return_outputs=True"):  # TRL's: it costs a second forward pass
        found = trainer.evaluate()
    longest = max(len(oracle_row(row)[0]) for row in rows)
    assert shapes == [((6, longest, 384), (6, longest))]
    assert found.pop("eval_mine") == 1.0
    for name in wanted:
        if not name.endswith(("runtime", "per_second", "time")):
            assert found[name] == pytest.approx(wanted[name], rel=1e-6), name


def test_a_prediction_of_the_loss_alone_builds_no_logits(tmp_path):
    trainer = make_trainer(
        tmp_path, make_rows(4), eval_dataset=make_rows(4), tokenizer=TOKENIZER, prediction_loss_only=True
    )
    output = trainer.predict(trainer.eval_dataset)  # a warning of TRL's would be an error here
    assert output.predictions.shape == (4,)  # expected scores
    assert output.metrics["test_score/rmse"] > 0


def test_evaluation_in_bfloat16_is_that_of_the_model_in_bfloat16(tmp_path):
    settings = {"eval_dataset": make_rows(6, seed=4), "tokenizer": TOKENIZER}
    found = make_trainer(tmp_path, make_rows(4), bf16_full_eval=True, **settings).evaluate()
    with torch.no_grad():
        nll, _, errors = oracle_terms(make_model().bfloat16(), make_rows(6, seed=4))
    gold = torch.tensor([row["score"] for row in make_rows(6, seed=4)], dtype=torch.float64)
    expected = gold - errors.sqrt()  # an untrained model expects next to nothing, so less than the gold score
    # The model in float32 is 3e-2 away; a padded batch is summed in another order than a row alone.
    assert found["eval_loss/rationale"] == pytest.approx(nll.mean().item(), rel=1e-3)
    assert found["eval_score/expected"] == pytest.approx(expected.mean().item(), rel=1e-2)


# Two ranks

LOCAL_MEANS = {"average_tokens_across_devices": False, "per_device_train_batch_size": 2}


def update_of_local_means(output_dir: Path) -> dict[str, torch.Tensor]:
    return update(output_dir, make_rows(4, seed=1), max_steps=1, **LOCAL_MEANS)


@pytest.mark.process
def test_without_averaging_over_devices_two_ranks_take_the_mean_of_their_own_updates(tmp_path, two_ranks):
    rows = make_rows(4, seed=1)
    halves = [update(tmp_path / str(i), rows[i : i + 2], max_steps=1, **LOCAL_MEANS) for i in (0, 2)]
    wanted = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    for found in two_ranks(update_of_local_means, tmp_path / "ranks"):
        assert relative_difference(found, wanted) <= 1e-5
