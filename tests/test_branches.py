"""Training on grids of several tokens: one forward pass with branches is one forward pass a score.

The reference writes a row with each score, runs the model on it alone in float64, and multiplies the probabilities of
the score's tokens (`test_trie.written_rows`); it knows nothing of tries or branches.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import WORDS, make_model, make_trainer
from peft import LoraConfig, get_peft_model
from test_trie import GRIDS, written_rows
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MambaConfig, MistralConfig, Qwen3Config

from trl_tract import ScoreGrid
from trl_tract.backends.branches import TreePass, further_forwards, why_not_one_forward
from trl_tract.scale.trie import TokenTrie

MARKER = "[RESULT]"


@pytest.fixture(autouse=True)
def one_forward(monkeypatch):
    """The trainer is not let out: it would find by itself that branches went wrong, and take the slow way."""
    monkeypatch.setattr("trl_tract.training.trainer.why_not_one_forward", lambda model: None)


def make_rows(
    grid: ScoreGrid, n: int = 5, *, seed: int = 0, markers: Sequence[str] = (MARKER,)
) -> list[dict[str, Any]]:
    """Rows of unequal lengths whose gold scores, means of two annotators, may lie between the grid's values."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        texts = [rng.choice(grid.texts) for _ in markers]
        parts = [
            f" {' '.join(rng.choices(WORDS, k=rng.randint(1, 6)))} {marker} {text}"
            for marker, text in zip(markers, texts, strict=True)
        ]
        row: dict[str, Any] = {
            "prompt": f"is this polite? {' '.join(rng.choices(WORDS, k=rng.randint(1, 9)))} ->",
            # The end of every score is one and the same, also where a score follows it.
            "completion": "\n".join(parts),
        }
        # Two annotators each, one of them at an end of the grid: those are scores of several tokens in most grids.
        golds = [[grid.value_of(text), grid.values[-(i % 2)]] for text in texts]
        named = dict(zip(markers, golds, strict=True))
        rows.append(row | ({"scores": named} if len(markers) > 1 else {"score": golds[0]}))
    return rows


def oracle(model: Any, tokenizer: Any, grid: ScoreGrid, rows: list[dict[str, Any]], normalize: bool) -> torch.Tensor:
    """Mean over the rows of the squared error of the expected score and of the annotators' cross-entropy.

    From one forward pass for each row and score. The second term is there because the first hardly feels an improbable
    score, and the scores of several tokens are improbable in a random model.
    """
    terms = []
    for row in rows:
        before = row["prompt"] + row["completion"][: row["completion"].index(MARKER) + len(MARKER)] + " "
        start, ids, stops = written_rows(tokenizer, grid.texts, before)
        scores = []
        for written, stop in zip(ids, stops, strict=True):
            logprobs = model(torch.tensor([written]), use_cache=False).logits[0].log_softmax(-1)
            assert logprobs.dtype == torch.float64
            scores.append(sum(logprobs[t - 1, written[t]] for t in range(start, stop)))
        probs = torch.stack(scores).exp()
        expected = (probs * torch.tensor(grid.values, dtype=torch.float64)).sum() / (probs.sum() if normalize else 1)
        squared_error = (expected - sum(row["score"]) / 2) ** 2
        terms.append(squared_error - sum(scores[grid.values.index(value)] for value in row["score"]) / 2)
    return torch.stack(terms).mean()


def backward_by_score(model: Any, tokenizer: Any, grid: ScoreGrid, row: dict[str, Any]) -> torch.Tensor:
    """`oracle` of one row, with its gradients left in the model: for grids so long that no graph holds all passes.

    The chain rule by hand: the loss in the log-probabilities of the scores, and each of those in the weights.
    """
    before = row["prompt"] + row["completion"][: row["completion"].index(MARKER) + len(MARKER)] + " "
    start, ids, stops = written_rows(tokenizer, grid.texts, before)

    def logprob(k: int) -> torch.Tensor:
        hidden = model.base_model(torch.tensor([ids[k]]), use_cache=False).last_hidden_state[
            0, start - 1 : stops[k] - 1
        ]
        steps = model.get_output_embeddings()(hidden).log_softmax(-1)
        assert steps.dtype == torch.float64
        return steps[range(stops[k] - start), ids[k][start : stops[k]]].sum()

    with torch.no_grad():
        logprobs = torch.stack([logprob(k) for k in range(len(grid))])
    logprobs.requires_grad_()
    expected = (logprobs.exp() * torch.tensor(grid.values, dtype=torch.float64)).sum()
    annotators = sum(logprobs[grid.values.index(value)] for value in row["score"]) / 2
    loss = (expected - sum(row["score"]) / 2) ** 2 - annotators
    (slopes,) = torch.autograd.grad(loss, logprobs)
    for k, slope in enumerate(slopes):
        (slope * logprob(k)).backward()
    return loss.detach()


@pytest.mark.parametrize("vocabulary", ["splitting", "merging", "mistral"])
def test_gradients_of_0_to_100_equal_one_forward_per_score(tmp_path, vocabularies, vocabulary):
    tokenizer, grid = vocabularies[vocabulary], GRIDS["0 to 100"]
    (row,) = rows = make_rows(grid, 1, seed=3)
    trainer = make_trainer(
        tmp_path,
        rows,
        model=make_model(vocab=len(tokenizer)),
        tokenizer=tokenizer,
        rationale_weight=0.0,
        **settings_of(grid),
    )
    assert trainer.scales[0].grid.paths
    loss = loss_of(trainer)
    loss.backward()
    model = make_model(vocab=len(tokenizer)).double()
    wanted = backward_by_score(model, tokenizer, grid, row)
    torch.testing.assert_close(loss.detach().double(), wanted, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(trainer.model), gradients(model))


def settings_of(grid: ScoreGrid) -> dict[str, Any]:
    annotators = {"annotator_loss": "distribution", "annotator_weight": 1.0}
    return {"score_values": dict(zip(grid.texts, grid.values, strict=True)), **annotators}


def batch_of(trainer: Any) -> tuple[dict[str, Any], Any]:
    (batch,), num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    return batch, num_items


def loss_of(trainer: Any) -> torch.Tensor:
    batch, num_items = batch_of(trainer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.router_aux_loss_coef = 0.0  # the experts' balance is no part of the score
    return trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    assert whole > 0
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= rtol * gradient.norm() + 1e-6 * whole, name


CASES = [
    ("llama", "splitting", "1 to 10", {}),
    ("llama", "splitting", "half points to 10", {}),
    ("llama", "merging", "half points to 10", {}),
    ("llama", "splitting", "below and above zero", {"normalize_grid": True}),
    ("llama", "mistral", "1 to 10", {}),
    ("llama", "mistral", "letters", {}),
    ("llama", "merging", "words", {}),
    ("qwen2", "splitting", "letters", {}),
    ("gpt_neox", "splitting", "1 to 10", {}),
    ("gemma2", "splitting", "1 to 10", {"normalize_grid": True}),
    ("gemma2", "splitting", "words", {}),
    ("granite", "splitting", "1 to 10", {}),
]


@pytest.mark.parametrize(("family", "vocabulary", "name", "settings"), CASES)
def test_score_terms_and_gradients_equal_one_forward_per_score(
    tmp_path, vocabularies, family, vocabulary, name, settings
):
    tokenizer, grid = vocabularies[vocabulary], GRIDS[name]
    rows = make_rows(grid, 3)
    model = make_model(family, vocab=len(tokenizer))
    trainer = make_trainer(
        tmp_path, rows, model=model, tokenizer=tokenizer, rationale_weight=0.0, **settings_of(grid), **settings
    )
    assert trainer.scales[0].grid.paths
    loss = loss_of(trainer)
    loss.backward()
    reference = make_model(family, vocab=len(tokenizer)).double()
    wanted = oracle(reference, tokenizer, grid, rows, settings.get("normalize_grid", False))
    wanted.backward()
    torch.testing.assert_close(loss.detach().double(), wanted.detach(), rtol=1e-5, atol=0)
    assert_same_gradients(gradients(trainer.model), gradients(reference))


def test_gradients_of_an_adapter_equal_one_forward_per_score(tmp_path, vocabularies):
    # The adapter's modules are called by the branches as by the rows; its B matrices start at 0, so both get others.
    tokenizer, grid = vocabularies["splitting"], GRIDS["half points to 10"]
    rows = make_rows(grid, 3)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(
        tmp_path, rows, tokenizer=tokenizer, rationale_weight=0.0, extra={"peft_config": adapter}, **settings_of(grid)
    )
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    reference = get_peft_model(make_model(), adapter)
    reference.load_state_dict(trainer.model.state_dict())
    reference = reference.double()
    loss = loss_of(trainer)
    loss.backward()
    wanted = oracle(reference, tokenizer, grid, rows, False)
    wanted.backward()
    torch.testing.assert_close(loss.detach().double(), wanted.detach(), rtol=1e-5, atol=0)
    found = gradients(trainer.model)
    assert found
    assert all("lora" in name for name in found)
    assert_same_gradients(found, gradients(reference))


def test_the_scores_probabilities_equal_the_references(tmp_path, vocabularies):
    # 0 to 100 in one forward pass, on the scale of logarithms, which shows what is wrong with an improbable score.
    tokenizer, grid = vocabularies["splitting"], GRIDS["0 to 100"]
    (row,) = rows = make_rows(grid, 1)
    trainer = make_trainer(tmp_path, rows, tokenizer=tokenizer, **settings_of(grid))
    batch, _ = batch_of(trainer)
    positions = ~batch["score_labels"][:, 1:].isnan()
    with torch.no_grad():
        found = trainer.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], score_positions=positions
        ).score_logprobs
        before = row["prompt"] + row["completion"][: row["completion"].index(MARKER) + len(MARKER)] + " "
        start, ids, stops = written_rows(tokenizer, grid.texts, before)
        model = make_model()
        wanted = [
            sum(model(torch.tensor([written])).logits[0].log_softmax(-1)[t - 1, written[t]] for t in range(start, stop))
            for written, stop in zip(ids, stops, strict=True)
        ]
    torch.testing.assert_close(found[0], torch.stack(wanted), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[0].exp(), torch.stack(wanted).exp(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_the_rows_themselves_are_as_without_branches(tmp_path, vocabularies, family):
    grid = GRIDS["0 to 100"]
    trainer = make_trainer(
        tmp_path, make_rows(grid), model=make_model(family), tokenizer=vocabularies["splitting"], **settings_of(grid)
    )
    batch, _ = batch_of(trainer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        branched = trainer.model(**inputs, score_positions=~batch["score_labels"][:, 1:].isnan()).logits
        plain = trainer.model(**inputs).logits
    torch.testing.assert_close(branched[kept], plain[kept], rtol=1e-5, atol=1e-5)


# One update in many ways

SAME: dict[str, dict[str, Any]] = {
    "row by row": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
    "packed": {"packing": True, "max_length": 160},
    "packed and padded": {"packing": True, "max_length": 160, "pad_to_multiple_of": 64},
    "padding-free": {"padding_free": True, "max_length": None},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_several_scores_a_row_give_the_same_update_however_they_are_batched(tmp_path, vocabularies, family, name):
    grid = GRIDS["half points to 10"]
    markers = ["[A]", "[B]", "[C]"]
    rows = make_rows(grid, 6, markers=markers)
    for row in rows:
        row["completion"] += "\n"
    aspects = {marker: {"marker": marker, "values": grid.values} for marker in markers}
    annotators = {"annotator_loss": "distribution", "annotator_weight": 1.0}

    def update(**settings: Any) -> dict[str, torch.Tensor]:
        settings = {"per_device_train_batch_size": 6, "max_steps": 1, "learning_rate": 0.1, **settings}
        trainer = make_trainer(
            tmp_path,
            rows,
            model=make_model(family, std=0.1),
            tokenizer=vocabularies["splitting"],
            aspects=aspects,
            **annotators,
            **settings,
        )
        trainer.train()
        before = make_model(family, std=0.1).state_dict()
        return {key: value.double() - before[key].double() for key, value in trainer.model.state_dict().items()}

    found, wanted = (torch.cat([v.flatten() for v in update(**way).values()]) for way in (SAME[name], {}))
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


# The slow way


@pytest.mark.parametrize("settings", [{}, {"padding_free": True, "max_length": None}])
def test_further_forward_passes_give_the_same_loss_and_gradients(tmp_path, vocabularies, monkeypatch, settings):
    grid = GRIDS["half points to 10"]
    results = []
    for refusal in (None, "it was told not to"):
        monkeypatch.setattr("trl_tract.training.trainer.why_not_one_forward", lambda model, refusal=refusal: refusal)
        trainer = make_trainer(
            tmp_path, make_rows(grid), tokenizer=vocabularies["splitting"], **settings_of(grid), **settings
        )
        loss = loss_of(trainer)
        loss.backward()
        results.append((loss.detach(), gradients(trainer.model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    assert_same_gradients(results[1][1], results[0][1])


def tiny(config_class: Any, **extra: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**sizes, initializer_range=0.4, **extra))


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gpt_neox", "gemma2", "cohere", "granite", "mixtral", "qwen3_moe"]
)
def test_known_families_take_one_forward(family):
    assert why_not_one_forward(make_model(family)) is None


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny(BloomConfig), "BloomForCausalLM ignores the mask"),
        (lambda: tiny(FalconConfig, alibi=True), "FalconForCausalLM ignores the mask"),
        (lambda: tiny(MambaConfig), "layers other than standard attention"),
    ],
)
def test_what_takes_no_branches_says_why(model, reason):
    assert reason in why_not_one_forward(model())


def test_attention_without_a_mask_says_why():
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    assert why_not_one_forward(model) == "attn_implementation='flash_attention_2' takes no mask (sdpa and eager do)"


@pytest.mark.parametrize(
    "model",
    [
        lambda: make_model("gemma2"),
        lambda: tiny(MistralConfig, intermediate_size=48, num_key_value_heads=2, sliding_window=6),
        lambda: tiny(
            Qwen3Config,
            intermediate_size=48,
            num_key_value_heads=2,
            head_dim=8,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=1,
        ),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_branches_see_a_sliding_window_as_it_would_be_in_place(model, attention):
    model = model().eval()
    model.config.sliding_window = 6  # shorter than the rows
    model.set_attn_implementation(attention if model.config.model_type != "gemma2" else "eager")
    trie = TokenTrie.from_paths([(0, 0, 0), (0, 0, 1), (0, 1), (1, 0)])
    input_ids = torch.arange(40).reshape(2, 20) * 7 % 90
    positions = torch.zeros(2, 19, dtype=torch.bool)
    positions[0, [9, 16]] = positions[1, 12] = True
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    branches = TreePass(trie, positions, model.config, share=False)
    with torch.no_grad():
        wanted = further_forwards(model.base_model, inputs, positions, trie)
        output = model.base_model(**branches.extend(model.base_model, (), inputs)[1])
        found = branches.split(output)
        plain = model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.last_hidden_state, plain, rtol=1e-4, atol=1e-5)


def test_left_padding_is_not_seen(vocabularies):
    model, trie = make_model().eval(), TokenTrie.from_paths([(5, 6), (5, 7), (8,)])
    row = torch.arange(20, 30)[None]
    padded = torch.cat([torch.full((1, 4), 3), row], dim=1)
    mask = (torch.arange(14) >= 4).long()[None]
    found = []
    for input_ids, attention_mask, at in ((row, torch.ones_like(row), 6), (padded, mask, 10)):
        positions = torch.zeros(1, input_ids.shape[1] - 1, dtype=torch.bool)
        positions[0, at] = True
        branches = TreePass(trie, positions, model.config, share=False)
        ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": ids}
        with torch.no_grad():
            found.append(branches.split(model.base_model(**branches.extend(model.base_model, (), inputs)[1])))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_the_experts_balance_is_that_of_the_rows(tmp_path, vocabularies):
    # The load-balancing term of a batch must not count the branches' tokens.
    grid = GRIDS["1 to 10"]
    trainer = make_trainer(
        tmp_path,
        make_rows(grid),
        model=make_model("mixtral"),
        tokenizer=vocabularies["splitting"],
        **settings_of(grid),
    )
    batch, _ = batch_of(trainer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    positions = ~batch["score_labels"][:, 1:].isnan()
    with torch.no_grad():
        with_branches, without = (
            trainer.model(**inputs, **more, fused_lm_head=True, output_router_logits=True).aux_loss
            for more in ({"score_positions": positions}, {})
        )
    torch.testing.assert_close(with_branches, without, rtol=1e-5, atol=0)


@pytest.mark.parametrize("refusal", [None, "it was told not to"])
def test_the_way_is_said_once(tmp_path, vocabularies, monkeypatch, refusal):
    said: list[str] = []
    monkeypatch.setattr("trl_tract.training.trainer.why_not_one_forward", lambda model: refusal)
    monkeypatch.setattr("trl_tract.training.judge_trainer.logger.warning", lambda message, *rest: said.append(message))
    grid = GRIDS["0 to 100"]
    make_trainer(tmp_path, make_rows(grid), tokenizer=vocabularies["splitting"], **settings_of(grid))
    about = [message for message in said if "several tokens" in message]
    assert about == [
        "a score is several tokens: each adds 10 token(s) to the single forward pass"
        if refusal is None
        else "a score is several tokens, and it was told not to: each costs 9 more forward pass(es) over its row. The "
        "result is the same"
    ]


def test_single_tokens_go_the_old_way(tmp_path, vocabularies, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no branches are needed")

    for name in (
        "training.score_head.TreePass",
        "training.score_head.further_forwards",
        "scale.logprobs.trie_logprobs",
    ):
        monkeypatch.setattr(f"trl_tract.{name}", fail)
    grid = ScoreGrid.from_values([1, 2, 3, 4, 5])
    trainer = make_trainer(tmp_path, make_rows(grid), tokenizer=vocabularies["splitting"])
    assert loss_of(trainer).isfinite()
