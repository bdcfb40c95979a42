"""The score rows: grid-token log-probabilities at the score positions, computed inside the model's own forward pass.

Inside, because under FSDP2 and ZeRO-3 the head's weight is whole only there. Knows nothing of losses or datasets.
"""

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trl_tract.backends.branches import Branches, further_forwards
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.logprobs import aspect_logprobs, grid_logprobs, trie_logprobs
from trl_tract.scale.trie import TokenTrie


def add_score_head(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    trie: TokenTrie | None = None,
    *,
    one_forward: bool = True,
    grids: Sequence[ScoreGrid] = (),
) -> None:
    """Let `model(..., score_positions=mask)` also return `score_logprobs`, at the cost of the S score rows alone.

    `score_positions`, bool `(B, L - 1)`, is True where the next token is a score; `score_logprobs`, float32 `(S, K)`,
    holds the grid's log-probabilities there, nats, in row-major order of the mask. Calls without `score_positions` are
    left as they were.

    Whatever forward the model has at this time is wrapped, TRL's fused LM head included, and no second forward pass is
    made: a hook takes the score rows from the backbone's last hidden state. With a `trie` there is a row for each of
    its nodes, `(S, N)` of them. With `grids`, a call names the grid of each score as well: `score_aspects`, int64
    `(B, L - 1)`, and K is that of the longest grid.

    Args:
        model: Causal language model, without its PEFT wrapper.
        token_ids: Tokens of the score grid, `K` of them; not looked at where there is a trie.
        trie: Of a grid of several tokens a score.
        one_forward: Whether the trie's nodes go into the same forward pass, as branches; see `branches.py`.
        grids: Of the aspects, where completions have several; `token_ids` and `trie` are not looked at then.
    """
    if grids:
        tries = [grid.trie for grid in grids if grid.paths]
        trie = TokenTrie.union(tries) if tries else None
    branching = torch.tensor([bool(grid.paths) for grid in grids])
    inner_forward = model.forward
    transform = logit_transform(model)

    def by_aspect(head: Any, rows: torch.Tensor, nodes: torch.Tensor | None, aspects: torch.Tensor) -> torch.Tensor:
        """As scores of different grids have different nodes, positions and nodes go through the head in one list."""
        states = rows if nodes is None else torch.cat([rows, nodes.flatten(0, 1).to(rows)])
        logits = transform(head(states.to(head.weight.device)))
        inner = None if nodes is None else logits[len(rows) :].reshape(*nodes.shape[:2], logits.shape[-1])
        union = trie or TokenTrie.union([])
        return aspect_logprobs(logits[: len(rows)], inner, aspects.to(logits.device), grids, union)

    # `generate` validates its arguments against the signature, so keep it.
    @functools.wraps(inner_forward)
    def forward(
        self: Any,
        *args: Any,
        score_positions: torch.Tensor | None = None,
        score_aspects: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if score_positions is None:
            return inner_forward(*args, **kwargs)
        score_logprobs: list[torch.Tensor] = []
        labels = kwargs.get("labels")
        kept = None
        if kwargs.get("fused_lm_head") and labels is not None and labels.device.type == "cpu":
            # On a CPU, TRL's fused head scores the prompt's positions as well; give it those that have a label.
            kept = labels[:, 1:] != -100  # (B, L - 1)
            kept[0, 0] |= ~kept.any()
            kwargs["labels"], kwargs["shift_labels"] = None, labels[:, 1:][kept][None]

        places = score_positions
        if score_aspects is not None and trie is not None:
            # A score that is one token needs no branches.
            places = score_positions & branching.to(score_aspects.device)[score_aspects.clamp(min=0)]
        branches = Branches(trie, places, self.config.get_text_config()) if trie and one_forward else None
        inner = further_forwards(self.base_model, kwargs, places, trie) if trie and not branches else None

        # Before the fused head, so that autograd reaches it afterwards: else its gradient of the head's weight, (V, H),
        # would be alive beside the fused head's tiles, at the peak of the step.
        def score_first(module: Any, inputs: Any, output: Any) -> Any:
            nodes = inner if branches is None else branches.split(output)  # (S, N - 1, H)
            hidden_states = output.last_hidden_state  # (B, L, H)
            rows = hidden_states[:, :-1][score_positions.to(hidden_states.device)]  # (S, H)
            # By its own call, which gathers the weight where FSDP2 or ZeRO-3 hold a shard of it.
            head = self.get_output_embeddings()
            if score_aspects is not None:
                score_logprobs.append(by_aspect(head, rows, nodes, score_aspects[score_positions]))
            else:
                if nodes is not None:
                    rows = torch.cat([rows[:, None], nodes.to(rows)], dim=1)  # (S, N, H)
                logits = transform(head(rows.to(head.weight.device)))  # (S, V) or (S, N, V)
                score_logprobs.append(grid_logprobs(logits, token_ids) if trie is None else trie_logprobs(logits, trie))
            if kept is not None:
                output.last_hidden_state = hidden_states[:, :-1][kept][None]  # (1, N, H)
            return output

        # Backbone and head are looked up at each call: PEFT and FSDP replace modules after this function has run.
        hooks = [self.base_model.register_forward_hook(score_first)]
        if branches is not None:
            hooks.append(self.base_model.register_forward_pre_hook(branches.extend, with_kwargs=True))
        try:
            outputs = inner_forward(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        output_type: Any = type(outputs)
        return _with_score_logprobs(output_type)(**outputs, score_logprobs=score_logprobs[0])

    model.forward = types.MethodType(forward, model)


def logit_transform(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a model's forward does to the output of its head: scaling (Cohere, Granite, ...), soft-capping (Gemma).

    Example:
        >>> from transformers import GraniteConfig, GraniteForCausalLM
        >>> tiny = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        >>> granite = GraniteForCausalLM(GraniteConfig(**tiny, num_key_value_heads=1, logits_scaling=4.0))
        >>> logit_transform(granite)(torch.tensor([8.0]))
        tensor([2.])
    """
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        if getattr(config, "logits_scaling", None) is not None:
            # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
            scaling = float(config.logits_scaling)
            scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


@functools.cache
def _with_score_logprobs(output_type: Any) -> Any:
    """A ModelOutput class with a declared `score_logprobs`: DDP and FSDP rebuild outputs from their declared fields."""
    fields = [("score_logprobs", torch.Tensor | None, field(default=None))]
    return make_dataclass(f"{output_type.__name__}WithScores", fields, bases=(output_type,))
