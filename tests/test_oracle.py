"""Loss and gradients of TRACTTrainer against the formula of CoT-RAFT, written out in float64 with full logits.

The oracle knows nothing of the package: it tokenises the rows itself, runs the model's own plain forward on one
unpadded row at a time, shifts by hand, and takes the log-softmax over the whole vocabulary.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ASPECTS, make_aspect_rows, make_model, make_rows, make_tokenizer, make_trainer
from peft import LoraConfig, get_peft_model

TOKENIZER = make_tokenizer()


def lora_config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def oracle_row(row: dict[str, Any]) -> tuple[list[int], int, list[int]]:
    """Token ids, length of the prompt, indices of the scores.

    A single score by the known ends `5<|end|>` and `5<|im_end|>\\n`; several by tokenising the text before each.
    """
    if isinstance(row["prompt"], str):
        asked, whole, from_end = row["prompt"], row["prompt"] + row["completion"] + "<|end|>", 2
    else:
        user, assistant = row["prompt"][0]["content"], row["completion"][0]["content"]
        asked = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        whole, from_end = f"{asked}{assistant}<|im_end|>\n", 3
    ids = TOKENIZER(whole).input_ids
    prompt_length = len(TOKENIZER(asked).input_ids)
    assert ids[:prompt_length] == TOKENIZER(asked).input_ids
    if "scores" in row:
        before = [whole[: len(asked) + found.start(1)] for found in re.finditer(r"\[[A-Z]+\] (\d)", row["completion"])]
        indices = [len(TOKENIZER(text).input_ids) for text in before]
    else:
        indices = [len(ids) - from_end]
    assert all(TOKENIZER.decode(ids[index]) in "12345" for index in indices)
    return ids, prompt_length, indices


def histogram(scores: list[float]) -> torch.Tensor:
    """Share of annotators at 1 to 5; 2.5 is half a 2 and half a 3."""
    shares = torch.zeros(5, dtype=torch.float64)
    for score in scores:
        for k in range(5):
            shares[k] += max(0.0, 1 - abs(score - (k + 1))) / len(scores)
    return shares


def oracle_loss(
    model: Any,
    rows: list[dict[str, Any]],
    *,
    raft_weight: float = 1.0,
    rationale_weight: float = 1.0,
    score_in_ce: bool = False,
    normalize_grid: bool = False,
    annotator_weight: float = 0.0,
    annotator_loss: str = "none",
) -> torch.Tensor:
    """rationale_weight * sum(nll) / tokens + raft_weight * sum((expected - gold)^2) / scores, over all rows.

    And annotator_weight times the mean cross-entropy to the annotators' histogram.
    """
    grid_ids = TOKENIZER.convert_tokens_to_ids(["1", "2", "3", "4", "5"])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    nll: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    disagreements: list[torch.Tensor] = []
    for row in rows:
        ids, prompt_length, score_indices = oracle_row(row)
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        assert logits.dtype == torch.float64
        log_probs = logits - logits.exp().sum(dim=-1, keepdim=True).log()
        for t in range(prompt_length, len(ids)):
            if t not in score_indices or score_in_ce:
                nll.append(-log_probs[t - 1, ids[t]])  # the token at t is predicted at t - 1
        for index, gold in zip(
            score_indices, row["scores"].values() if "scores" in row else [row["score"]], strict=True
        ):
            annotators = gold if isinstance(gold, list) else [gold]
            probs = log_probs[index - 1].exp()[grid_ids]
            expected = (probs * values).sum() / (probs.sum() if normalize_grid else 1.0)
            errors.append((expected - sum(annotators) / len(annotators)) ** 2)
            disagreements.append(-(histogram(annotators) * probs.log()).sum())
    return (
        rationale_weight * torch.stack(nll).mean()
        + raft_weight * torch.stack(errors).mean()
        + annotator_weight * torch.stack(disagreements).mean()
    )


CASES = [(family, lora, False, {}) for family in
         ("llama", "qwen2", "gpt_neox", "gemma2", "cohere", "granite") for lora in (False, True)] + [
    ("llama", False, True, {}),
    ("gemma2", True, True, {}),
    ("llama", False, False, {"raft_weight": 0.0}),
    ("llama", False, False, {"raft_weight": 2.5}),
    ("gemma2", False, False, {"rationale_weight": 0.0}),
    ("llama", True, True, {"rationale_weight": 0.25, "raft_weight": 3.0}),
    ("qwen2", False, True, {"score_in_ce": True}),
    ("gemma2", False, False, {"score_in_ce": True, "raft_weight": 0.0}),
    ("llama", False, False, {"normalize_grid": True}),
    ("granite", True, True, {"normalize_grid": True, "score_in_ce": True, "raft_weight": 0.5}),
]  # fmt: skip


def name_of(case: tuple[str, bool, bool, dict[str, Any]]) -> str:
    family, lora, chat, settings = case
    parts = [family, "lora" if lora else "full", "chat" if chat else "text"]
    return "-".join([*parts, *(f"{key}={value}" for key, value in settings.items())])


@pytest.mark.parametrize(("family", "lora", "chat", "settings"), CASES, ids=map(name_of, CASES))
def test_loss_and_gradients_equal_the_formula(tmp_path, family, lora, chat, settings):
    assert_equals_the_formula(tmp_path, make_rows(6, seed=1, chat=chat), family, lora, settings)


def test_several_scores_in_one_completion_each_count_as_one(tmp_path):
    # 12 scores in 6 rows: a mean over rows would show.
    assert_equals_the_formula(tmp_path, make_aspect_rows(6, seed=1), "llama", False, {}, aspects=ASPECTS)


def test_annotators_of_several_scores_give_their_means_and_histograms(tmp_path):
    rows = make_aspect_rows(6, seed=1)
    for row, scores in zip(rows, ANNOTATED, strict=True):
        row["scores"] = {"tone": [float(score) for score in scores], "facts": [1.0, 4.5]}
    settings = {"annotator_loss": "distribution", "annotator_weight": 0.7}
    assert_equals_the_formula(tmp_path, rows, "llama", False, settings, aspects=ASPECTS)


ANNOTATED = [[1, 2], [5, 5, 4], [3], [2.5, 4], [1, 5], [2, 2, 2, 3]]


@pytest.mark.parametrize(
    "settings",
    [
        {},  # the mean alone
        {"annotator_loss": "distribution", "annotator_weight": 0.7},
        {"annotator_loss": "distribution", "annotator_weight": 2.0, "raft_weight": 0.0, "rationale_weight": 0.0},
    ],
)
def test_one_score_for_each_annotator_gives_their_mean_and_histogram(tmp_path, settings):
    rows = [{**row, "score": [float(s) for s in scores]}
            for row, scores in zip(make_rows(6, seed=1), ANNOTATED, strict=True)]  # fmt: skip
    assert_equals_the_formula(tmp_path, rows, "llama", False, settings)


def assert_equals_the_formula(
    output_dir: Path, rows: list[dict[str, Any]], family: str, lora: bool, settings: dict[str, Any], **more: Any
) -> None:
    # Three micro-batches of two rows each: tokens differ between them, so a mean per micro-batch would show.
    extra = {"peft_config": lora_config()} if lora else {}
    trainer = make_trainer(
        output_dir,
        rows,
        model=make_model(family),
        tokenizer=TOKENIZER,
        extra=extra,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        **settings,
        **more,
    )
    oracle = make_model(family)
    oracle = get_peft_model(oracle, lora_config()) if lora else oracle
    if lora:  # LoRA's B starts at 0, which would leave A without a gradient
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    oracle.load_state_dict(trainer.model.state_dict())
    oracle = oracle.double()

    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 3, trainer.args.device)
    trainer.model.train()
    loss = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items) for batch in batches)
    loss.backward()
    expected = oracle_loss(oracle, rows, **settings)
    expected.backward()

    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-5, atol=0)
    wanted = {name: p.grad for name, p in oracle.named_parameters() if p.requires_grad and p.grad is not None}
    found = {name: p.grad.double() for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(("lora" in name) == lora for name in found)
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        # A bias that softmax cannot see (keys in attention) has a true gradient of 0: judged against the whole.
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * whole, name


def test_evaluation_loss_of_a_batch_equals_the_formula(tmp_path):
    # Evaluation passes no counts: the means are over the batch itself.
    rows = make_rows(5, seed=2)
    trainer = make_trainer(tmp_path, rows, tokenizer=TOKENIZER, per_device_train_batch_size=5)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        expected = oracle_loss(make_model().double(), rows)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
