"""Passes over whole rows, for models that cannot go on from the keys and values of others.

Knows models and `model.generate`; knows nothing of trees or of scores.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from trl_tract.backends.branches import TreePass
from trl_tract.backends.continuation import Continuation
from trl_tract.backends.drawing import DrawEach, Drawing
from trl_tract.backends.stop_text import Ending, StopText
from trl_tract.scale.trie import TokenTrie


def innermost(model: PreTrainedModel | PeftModel) -> Any:
    """The transformers model under an adapter: it holds the forward signature and the generation settings."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `(B, L)` int64."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


def whole_rows(model: Any, rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """Logits after the last token of each row, `(B, V)`, of a pass over whole rows."""
    parameters = inspect.signature(innermost(model).forward).parameters
    input_ids, attention_mask = left_padded(rows, pad, model.device)
    extra: dict[str, Any] = {}
    if "position_ids" in parameters:
        extra["position_ids"] = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    if "logits_to_keep" in parameters:
        extra["logits_to_keep"] = 1
    output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra)
    last: torch.Tensor = output.logits[:, -1]
    return last


def branched(model: Any, rows: Sequence[Sequence[int]], trie: TokenTrie, pad: int) -> torch.Tensor:
    """Logits after each row and behind each other node of a trie that follows it, `(B, N, V)`; see `branches.py`."""
    input_ids, attention_mask = left_padded(rows, pad, model.device)
    owner = innermost(model)
    behind = torch.zeros_like(attention_mask, dtype=torch.bool)
    behind[:, -1] = True
    tree = TreePass(trie, behind, owner.config.get_text_config(), share=True)

    def ends(module: Any, inputs: Any, output: Any) -> None:
        # Of each row the last token and its branches are all that the head is given.
        branches: Any = tree.split(output)
        output.last_hidden_state = torch.cat([output.last_hidden_state[:, -1:], branches], dim=1)  # (B, N, H)

    hooks = [
        owner.base_model.register_forward_pre_hook(tree.extend, with_kwargs=True),
        owner.base_model.register_forward_hook(ends),
    ]
    try:
        logits: torch.Tensor = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(dim=-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=len(trie.nodes),
        ).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits


def write_with_generate(
    model: Any, batch: Sequence[Continuation], drawing: Drawing, ending: Ending, eos: Sequence[int], pad: int
) -> None:
    """Write on every text until it ends, or until the first of them has no room left."""
    rows = [text.prompt_ids + text.written for text in batch]
    input_ids, attention_mask = left_padded(rows, pad, model.device)
    length = input_ids.shape[1]
    watch = StopText([text.watch(ending) for text in batch], [length - len(text.written) for text in batch])
    numbers = [text.numbers[len(text.written) :] for text in batch]
    drawn = DrawEach(drawing, attention_mask == 0, lambda step: [one[step] for one in numbers])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=no_settings(
            do_sample=False,
            max_new_tokens=min(text.room for text in batch),
            eos_token_id=list(eos) or None,
            pad_token_id=pad,
        ),
        logits_processor=LogitsProcessorList([drawn]),
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    for row, (text, new) in enumerate(zip(batch, output[:, length:].tolist(), strict=True)):
        # What follows the end is padding, and padding may be an end-of-sequence token too: the first end counts.
        ends = [place + 1 for place, token in enumerate(new) if token in eos][:1]
        until, found = watch.found.get(row, (length + len(new), None))
        text.written += new[: min([*ends, until - length])]
        text.end(eos, found)


def no_settings(**fields: Any) -> Any:
    """Generation settings of these fields alone, not of a checkpoint."""
    generation_config: Any = GenerationConfig  # Its constructor is untyped.
    return generation_config(**fields)
