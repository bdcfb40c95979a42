"""A model small enough that all its rationales can be written down: six tokens, three of them at most.

The oracle knows nothing of the package: it lists the sequences, runs the model's own plain forward on each, and takes
the gradient of the expected squared error by autograd.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from tiny import PLAIN, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, SPACE, A, ONE, TWO, MARK = range(6)
MOST = 3  # tokens of a continuation
PROMPT = "1a"
GOLD = 1.3  # between the scores 1 and 2
PENALTY = 0.7


def enumerable_tokenizer() -> Any:
    letters = ["Ġ", "a", "1", "2", "#"]
    vocab = {token: i for i, token in enumerate(["<|end|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def enumerable_model(std: float = 0.2) -> Any:
    model = make_model(vocab=6, width=16, std=std).double()
    model.generation_config.pad_token_id = model.config.pad_token_id = END
    return model


def sequences() -> list[tuple[int, ...]]:
    """Every continuation: up to the marker, up to the end of the turn, or three tokens."""
    found: list[tuple[int, ...]] = []
    for length in range(1, MOST + 1):
        for body in itertools.product(range(6), repeat=length):
            if any(token in (END, MARK) for token in body[:-1]):
                continue
            if body[-1] in (END, MARK) or length == MOST:
                found.append(body)
    return found


def expected_loss(
    model: Any,
    prompt: Sequence[int],
    gold: float,
    grid: dict[str, float],
    *,
    gold_weight: float = 0.0,
) -> torch.Tensor:
    """E[(y_hat - gold)^2 - gold_weight * log p(gold)] over all continuations; PENALTY without a marker."""
    ids = {" ": SPACE, "a": A, "1": ONE, "2": TWO, "#": MARK}
    total = torch.zeros((), dtype=torch.float64)
    for continuation in sequences():
        row = [*prompt, *continuation]
        logprobs = model(torch.tensor([row]), use_cache=False).logits[0].log_softmax(dim=-1)
        chosen = [logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(continuation)]
        probability = torch.stack(chosen).sum().exp()
        loss = torch.tensor(PENALTY, dtype=torch.float64)
        if continuation[-1] == MARK:
            before = [*row, SPACE]
            probs = []
            for text in grid:
                whole = [*before, *(ids[letter] for letter in text)]
                logs = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(dim=-1)
                probs.append(torch.stack([logs[len(before) - 1 + i, ids[c]] for i, c in enumerate(text)]).sum().exp())
            values = torch.tensor(list(grid.values()), dtype=torch.float64)
            loss = ((torch.stack(probs) * values).sum() - gold) ** 2
            if gold_weight:
                weights = (1 - (values - gold).abs() / (values[1] - values[0])).clamp(min=0)
                loss = loss - gold_weight * (weights * torch.stack(probs).log()).sum()
        total = total + probability * loss
    return total


def probabilities(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    """Of each continuation, `(N,)`."""
    found = []
    with torch.no_grad():
        for continuation in sequences():
            logprobs = model(torch.tensor([[*prompt, *continuation]]), use_cache=False).logits[0].log_softmax(dim=-1)
            found.append(sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(continuation)).exp())
    return torch.stack(found)


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """Of what is trained, one behind the other."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, weights)])


SETTINGS: dict[str, Any] = {
    **PLAIN,
    "max_completion_length": MOST,
    "score_values": [1.0, 2.0],
    "score_marker": "#",
    "no_score_penalty": PENALTY,
    "learning_rate": 1.0,
    "max_steps": 1,
}
PLAIN_ROWS = [{"prompt": "a" * (1 + number % 3) + "12"[number % 2], "score": 1 + number / 8} for number in range(8)]
