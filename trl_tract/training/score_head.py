"""The score rows: grid-token log-probabilities at the score positions, computed inside the model's own forward pass.

Inside, because under FSDP2 and ZeRO-3 the head's weight is whole only there. Knows nothing of losses or datasets.
"""

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import field, make_dataclass
from typing import Any

import torch
import trl.trainer.utils
from transformers import PreTrainedModel

from trl_tract.backends.branches import TreePass, further_forwards
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.logprobs import scale_logprobs
from trl_tract.scale.trie import TokenTrie

_TILE_WIDTH = 1024  # tokens of the vocabulary for TRL's fused head on a CPU; one width, or it is compiled again


class _ScorePass:
    """The score rows of one call: hooks that send the branches through the backbone, and take the scores' rows out.

    Args:
        model: Whose backbone and head are looked up now: PEFT and FSDP replace modules after the head was added.
        grids: Resolved.
        union: Of the tries of the grids that have one; None where a score is one token.
        positions: True where the next token is a score's first, bool `(B, L - 1)`; or `(B, L)` where a score has yet
            to be written.
        aspects: Each position's grid, of the same shape, int64; None where there is one.
        inputs: What the backbone is called with.
        one_forward: Whether the trie's nodes go into the same forward pass.
        share: Whether rows that begin alike are computed as one.
        kept: Positions whose hidden states the model's own head is given, bool `(B, L - 1)`; None: all.
    """

    def __init__(
        self,
        model: Any,
        grids: Sequence[ScoreGrid],
        union: TokenTrie | None,
        positions: torch.Tensor,
        aspects: torch.Tensor | None,
        inputs: dict[str, Any],
        *,
        one_forward: bool,
        share: bool,
        kept: torch.Tensor | None,
    ) -> None:
        self.model, self.grids, self.union, self.positions, self.kept = model, grids, union, positions, kept
        self.numbers = None if aspects is None else aspects[positions]  # (S,)
        self.inner: torch.Tensor | None = None  # hidden states behind the trie's nodes, (P, N - 1, H)
        self.logprobs: torch.Tensor | None = None
        places = positions
        if union is not None:
            if aspects is not None:  # a score that is one token needs no branches
                several = torch.tensor([bool(grid.paths) for grid in grids], device=aspects.device)
                places = positions & several[aspects.clamp(min=0)]
            if not one_forward:
                self.inner = further_forwards(model.base_model, inputs, places, union)
        self.tree: TreePass | None = None
        if one_forward and (union is not None or share):
            self.tree = TreePass(union, places, model.config.get_text_config(), share=share)

    def __enter__(self) -> "_ScorePass":
        # Before the fused head, so that autograd reaches it afterwards: else its gradient of the head's weight, (V, H),
        # would be alive beside the fused head's tiles, at the peak of the step.
        self.hooks = [self.model.base_model.register_forward_hook(self._score)]
        if self.tree is not None:
            self.hooks.append(self.model.base_model.register_forward_pre_hook(self.tree.extend, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _score(self, module: Any, inputs: Any, output: Any) -> Any:
        inner = self.inner if self.tree is None else self.tree.split(output)
        hidden_states = output.last_hidden_state  # (B, L, H)
        states = hidden_states[:, : self.positions.shape[1]][self.positions.to(hidden_states.device)]  # (S, H)
        count = len(states)
        if inner is not None:
            states = torch.cat([states, inner.flatten(0, 1).to(states)])
        # By its own call, which gathers the weight where FSDP2 or ZeRO-3 hold a shard of it.
        head = self.model.get_output_embeddings()
        logits = logit_transform(self.model)(head(states.to(head.weight.device)))
        behind = None if inner is None else logits[count:].reshape(*inner.shape[:2], logits.shape[-1])
        roots = logits if inner is None else logits[:count]
        numbers = None if self.numbers is None else self.numbers.to(logits.device)
        self.logprobs = scale_logprobs(roots, behind, self.grids, self.union, numbers)
        if self.kept is not None:
            output.last_hidden_state = hidden_states[:, :-1][self.kept][None]  # (1, N, H)
        return output


def add_score_head(
    model: PreTrainedModel, grids: Sequence[ScoreGrid], *, one_forward: bool = True, share: bool = False
) -> None:
    """Let `model(..., score_positions=mask)` also return `score_logprobs`, at the cost of the S score rows alone.

    `score_positions`, bool `(B, L - 1)`, is True where the next token is a score, or `(B, L)` where rows end in front
    of one; `score_logprobs`, float32 `(S, K)`, holds the grid's log-probabilities there, nats, in row-major order of
    the mask. With several grids a call names the grid of each score as well: `score_aspects`, int64 and as long, and K
    is that of the longest. Calls without `score_positions` are left as they were.

    Whatever forward the model has at this time is wrapped, TRL's fused LM head included, and no second forward pass is
    made: a hook takes the score rows from the backbone's last hidden state.

    Args:
        one_forward: Whether the nodes of a grid of several tokens a score go into the same forward pass, as branches;
            see `branches.py`.
        share: Whether rows that begin alike are computed as one sequence, where `one_forward` and where that pays.
    """
    tries = [grid.trie for grid in grids if grid.paths]
    union = TokenTrie.union(tries) if tries else None
    inner_forward = model.forward

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
        labels, kept = kwargs.get("labels"), None
        if kwargs.get("fused_lm_head") and labels is not None and labels.device.type == "cpu":
            # On a CPU, TRL's fused head scores the prompt's positions as well; give it those that have a label.
            kept = labels[:, 1:] != -100  # (B, L - 1)
            kept[0, 0] |= ~kept.any()
            kwargs["labels"], kwargs["shift_labels"] = None, labels[:, 1:][kept][None]
        scores = _ScorePass(
            self, grids, union, score_positions, score_aspects, kwargs, one_forward=one_forward, share=share, kept=kept
        )
        with scores, nullcontext() if kept is None else _narrow_tiles():  # kept: on a CPU
            outputs = inner_forward(*args, **kwargs)
        if kept is not None:
            for name, value in outputs.items():
                if value is not None and value.shape == (1, int(kept.sum())):  # a number for each token
                    outputs[name] = value.new_zeros(kept.shape).masked_scatter(kept, value)
        output_type: Any = type(outputs)
        return _with_score_logprobs(output_type)(**outputs, score_logprobs=scores.logprobs)

    model.forward = types.MethodType(forward, model)


@contextmanager
def _narrow_tiles() -> Iterator[None]:
    """TRL's fused head with tiles of logits for a CPU, where it has eight of them at once, at the peak of a step.

    Its own are 32,768 tokens of the vocabulary wide, whatever the vocabulary: right for a GPU, whose kernel needs one.
    """
    width = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(width, _TILE_WIDTH)
    try:
        yield
    finally:
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = width


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
