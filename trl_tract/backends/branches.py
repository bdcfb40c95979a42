"""One forward pass over a batch in which what begins alike is computed once, and branches stand behind its scores.

Branches: for a grid of several tokens, hidden states are needed behind every inner node of its trie. Both are one tree
of tokens, each with the position that it has in place, and with a mask through which it sees what stands before it.
Where a model's attention takes no such mask, rows are computed one by one, and branches in further forward passes over
the row up to its score and each branch: slow, and the same numbers.

Knows nothing of losses, heads or trainers.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from trl_tract.backends import tree
from trl_tract.backends.masks import layer_masks
from trl_tract.backends.tree import Ints, cost_of
from trl_tract.scale.trie import TokenTrie

# Arrays of NumPy, which a compiled model would trace. Torch does not annotate the function.
lay_out = torch.compiler.disable(tree.lay_out)  # type: ignore[no-untyped-call]
_MASKED = ("sdpa", "eager", "flex_attention")
_LAYERS = {"full_attention", "sliding_attention"}
# Largest difference of the two ways, relative to the hidden states: far above the rounding of 16 bits, far below that
# of a branch that sees what it must not.
_SAME = 0.1
# Likewise between a row behind one row and behind another; here the tokens are computed alike.
_APART = 0.01


@dataclass(frozen=True)
class ScorePlaces:
    """The scores of a batch. S scores in B rows of L tokens.

    Attributes:
        rows: The row of each, `(S,)`, ascending.
        starts: Index of its first token, `(S,)`, ascending within a row.
    """

    rows: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, score_positions: torch.Tensor) -> "ScorePlaces":
        """From the mask that is True where the next token is a score's first, bool `(B, L - 1)` or `(B, L)`."""
        rows, before = score_positions.nonzero(as_tuple=True)
        return cls(rows, before + 1)


class TreePass:
    """One forward pass over a batch in which what begins alike stands once, and branches stand behind its scores.

    Extends what goes into the backbone, and takes apart what comes out: whoever looks at the output sees the rows as
    they were given.

    Args:
        trie: Of the grids of several tokens; None where there are none, and hence no branches.
        score_positions: True where the next token is a score's first, bool `(B, L - 1)`; or `(B, L)` where a score
            has yet to be written.
        config: Of the language model; says which layers see a window alone, and how masks are written.
        share: Whether rows are merged that begin alike. Where that does not pay, they are left as they are.
    """

    def __init__(self, trie: TokenTrie | None, score_positions: torch.Tensor, config: Any, *, share: bool) -> None:
        self.places = ScorePlaces.of(score_positions)
        self.config, self.share = config, share
        self.nodes = () if trie is None else trie.nodes[1:]
        self.taken: tuple[torch.Tensor, torch.Tensor] | None = None  # where rows and branches stand, (B, L), (S, N - 1)

    def extend(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """A forward pre-hook of the backbone that gives it the tree."""
        # Some models hand `input_ids` to their backbone by its place.
        kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        batch = _Documents.of(kwargs)
        # A path to each end of the trie serves all nodes on the way.
        ends = [node for node in self.nodes if not any(other[:-1] == node for other in self.nodes)]
        before = (self.places.rows * batch.shape[1] + self.places.starts - 1).tolist()
        paths = [batch.path(place, end) for place in before for end in ends]
        if not batch.sequences or not (paths or self.share):
            return (), kwargs
        owners = [*range(len(batch.sequences)), *(batch.numbers[place] for place in before for _ in ends)]
        attention = attention_cost(self.config)
        layout, cost = lay_out([*batch.sequences, *paths], owners, share=self.share, attention=attention)
        if not paths and batch.cost(attention, self.config._attn_implementation) <= cost:
            return (), kwargs

        device = kwargs["input_ids"].device
        behind = layout.places[len(batch.sequences) :]
        through = [next(i for i, end in enumerate(ends) if end[: len(node)] == node) for node in self.nodes]
        branches = [
            behind[score * len(ends) + end][batch.depths[place] + len(node)]
            for score, place in enumerate(before)
            for end, node in zip(through, self.nodes, strict=True)
        ]
        self.taken = (
            torch.from_numpy(batch.spread(layout.places)).to(device),
            torch.tensor(branches, dtype=torch.long, device=device).reshape(len(before), len(self.nodes)),
        )
        positions = torch.from_numpy(layout.positions).to(device)
        dtype = module.get_input_embeddings().weight.dtype
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_PACKED_KERNELS} | {
            "input_ids": torch.from_numpy(layout.tokens).to(device),
            "position_ids": positions,
            "attention_mask": layer_masks(self.config, torch.from_numpy(layout.ends).to(device), positions, dtype),
        }
        return (), kwargs

    def split(self, output: Any) -> torch.Tensor | None:
        """Put the rows back into a backbone's output; return the branches' hidden states, `(S, N - 1, H)`, if any."""
        hidden_states: torch.Tensor = output.last_hidden_state  # (R, T, H)
        if self.taken is None:
            return hidden_states.new_zeros(0, len(self.nodes), hidden_states.shape[-1]) if self.nodes else None
        rows, branches = (places.to(hidden_states.device) for places in self.taken)
        flat = hidden_states.flatten(0, 1)
        output.last_hidden_state = torch.nn.functional.embedding(rows, flat)  # (B, L, H)
        if getattr(output, "router_logits", None) is not None:
            # The load balance of a mixture of experts is that of the rows themselves, each with all its tokens.
            output.router_logits = tuple(
                torch.nn.functional.embedding(rows.flatten().to(logits.device), logits)
                for logits in output.router_logits
            )
        return torch.nn.functional.embedding(branches, flat) if self.nodes else None


@dataclass(frozen=True)
class _Documents:
    """The documents of a batch: its rows without their padding, or what was packed into them.

    Attributes:
        shape: Of the batch, `(B, L)`.
        sequences: Token ids and positions of each document, `(n, 2)`.
        where: Where in the `B * L` each stands.
        numbers: The document of each token of the batch, `(B * L,)`.
        depths: Its index there, `(B * L,)`.
    """

    shape: tuple[int, int]
    sequences: list[Ints]
    where: list[Ints]
    numbers: Ints
    depths: Ints

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> "_Documents":
        input_ids: torch.Tensor = kwargs["input_ids"]
        position_ids, kept, documents = _described(kwargs)
        # The one wait for the device.
        described = torch.stack([input_ids, position_ids, kept.long(), documents]).cpu().numpy()
        ids, positions, present, owners = described.reshape(4, -1)
        rows, length = input_ids.shape
        owners = np.where(present > 0, owners + np.arange(rows).repeat(length) * (length + 1), -1)
        where = [np.flatnonzero(owners == owner) for owner in np.unique(owners[owners >= 0])]
        numbers, depths = np.zeros((2, len(ids)), np.int64)
        for number, indices in enumerate(where):
            numbers[indices], depths[indices] = number, np.arange(len(indices))
        sequences = [np.stack([ids[indices], positions[indices]], axis=1) for indices in where]
        return cls((rows, length), sequences, where, numbers, depths)

    def path(self, place: int, end: tuple[int, ...]) -> Ints:
        """A document up to one of its tokens, and a branch behind it."""
        prefix = self.sequences[self.numbers[place]][: self.depths[place] + 1]
        return np.concatenate([prefix, np.stack([end, prefix[-1, 1] + 1 + np.arange(len(end))], axis=1)])

    def spread(self, places: list[Ints]) -> Ints:
        """Where each token of the batch stands in the tree, `(B, L)`; for padding, at which nobody looks, 0."""
        spread = np.zeros(len(self.numbers), np.int64)
        for indices, place in zip(self.where, places, strict=False):
            spread[indices] = place
        return spread.reshape(self.shape)

    def cost(self, attention: float, implementation: str) -> float:
        """Of the rows as they are; see `tree.cost_of`."""
        whole = sum(map(len, self.where)) == len(self.numbers) and len(self.where) == self.shape[0]
        # Where no mask is needed, sdpa leaves out the half of each row that causal attention does not see.
        return cost_of(*self.shape, attention / 2 if whole and implementation == "sdpa" else attention)


def attention_cost(config: Any) -> float:
    """What it costs a token that a row is one token longer, relative to the rest of its cost; see `tree.lay_out`.

    From multiplications in one layer, forward: four projections and three matrices of the MLP against the two products
    of attention. The factor is from measurements on a CPU, where a product with a mask takes that much longer.
    """
    width = config.hidden_size
    heads = (getattr(config, "num_attention_heads", None) or 0) * (getattr(config, "head_dim", None) or 0) or width
    inner = getattr(config, "intermediate_size", None) or 4 * width
    if isinstance(inner, Sequence):  # one for each layer
        inner = sum(inner) / len(inner)
    return float(2.5 * heads / (4 * width * heads + 3 * width * inner))


# Padding-free kernels read the documents from these; a mask says it all.
_OF_PACKED_KERNELS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def _described(kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a batch's tokens: positions, what is no padding, and the number of the document in its row, `(B, L)` each."""
    input_ids: torch.Tensor = kwargs["input_ids"]
    padding, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    rows, length = input_ids.shape
    documents = torch.zeros_like(input_ids)
    if position_ids is None:
        position_ids = torch.arange(length, device=input_ids.device).expand(rows, length)
    elif padding is None:
        # The rule by which transformers finds packed rows: a document begins where positions do not go on.
        jumps = position_ids.diff(prepend=position_ids[:, :1] - 1, dim=1) != 1
        documents = jumps.cumsum(dim=1).expand(rows, length)
    kept = torch.ones_like(input_ids, dtype=torch.bool) if padding is None else padding.bool()
    return position_ids.expand(rows, length), kept, documents


def further_forwards(
    backbone: Any, inputs: dict[str, Any], score_positions: torch.Tensor, trie: TokenTrie
) -> torch.Tensor:
    """Hidden states behind each inner node but the root, `(S, N - 1, H)`, without a mask of our own.

    Args:
        inputs: What the model was called with: `input_ids` and, if they are there, `attention_mask`, `position_ids`.
        score_positions: True where the next token is a score's first, bool `(B, L - 1)`.
    """
    places = ScorePlaces.of(score_positions)
    input_ids = inputs["input_ids"]
    position_ids, kept, documents = _described(inputs)
    nodes = trie.nodes[1:]
    # A pass over a branch's end serves all nodes on the way.
    ends = [node for node in nodes if not any(other[:-1] == node for other in nodes)]
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    lengths: list[int] = []
    for row, start in zip(places.rows.tolist(), places.starts.tolist(), strict=True):
        seen = kept[row] & (documents[row] == documents[row, start - 1])
        seen[start:] = False
        prefix, positions = input_ids[row][seen], position_ids[row][seen]
        lengths.append(len(prefix))
        for end in ends:
            more = torch.arange(1, len(end) + 1, device=input_ids.device)
            rows.append((torch.cat([prefix, prefix.new_tensor(end)]), torch.cat([positions, positions[-1] + more])))
    hidden: list[torch.Tensor] = []
    chunks = [rows[at : at + len(input_ids)] for at in range(0, len(rows), max(len(input_ids), 1))]
    # Asked for before the first of them: a pass gathers weights, and the ranks have to gather in step.
    idle = _idle_passes(backbone, input_ids, _most_passes(backbone, len(chunks)) - len(chunks))
    for chunk in chunks:
        ids, positions = (
            torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*chunk, strict=True)
        )
        sizes = torch.tensor([len(row) for row, _ in chunk], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]
        output = backbone(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        hidden += list(output.last_hidden_state)  # (L', H) each
    through = [next(i for i, end in enumerate(ends) if end[: len(node)] == node) for node in nodes]
    found = [
        hidden[score * len(ends) + end][length + len(node) - 1]
        for score, length in enumerate(lengths)
        for node, end in zip(nodes, through, strict=True)
    ]
    if not found:
        size = backbone.get_input_embeddings().weight.shape[-1]
        return torch.zeros(0, len(nodes), size, device=input_ids.device) + idle
    return torch.stack(found).reshape(len(lengths), len(nodes), -1) + idle


def _most_passes(backbone: Any, passes: int) -> int:
    """The most passes that any rank makes, if all have to make as many because each holds a part of the weights."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or not _is_sharded(backbone):
        return passes
    most = torch.tensor(passes, device=backbone.get_input_embeddings().weight.device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def _is_sharded(backbone: Any) -> bool:
    """Whether FSDP, of either version, or ZeRO-3 gathers the weights at each pass."""
    if any(hasattr(weight, "full_tensor") or hasattr(weight, "ds_id") for weight in backbone.parameters()):
        return True
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in backbone.modules())


def _idle_passes(backbone: Any, input_ids: torch.Tensor, count: int) -> torch.Tensor | float:
    """Zero, of which `count` passes over a token are a part, so that their backward passes are made as well."""
    zero: torch.Tensor | float = 0.0
    for _ in range(count):
        hidden = backbone(input_ids=input_ids[:1, :1], use_cache=False).last_hidden_state
        zero = zero + (0 * hidden).sum()  # in this order: a sum in 16 bits may overflow, and 0 * inf is NaN
    return zero


def why_not_one_forward(model: PreTrainedModel) -> str | None:
    """Why a model cannot be given branches; None if it can.

    What its configuration does not tell is tried out on a few tokens, where its weights are whole.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if attention not in _MASKED:
        return f"attn_implementation={attention!r} takes no mask (sdpa and eager do)"
    if attention == "flex_attention" and model.device.type == "cpu":
        return "flex_attention has no backward pass on a CPU"
    others = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if others or getattr(model, "_is_stateful", False):
        kinds = ", ".join(sorted(others)) or config.model_type
        return f"it has layers other than standard attention ({kinds})"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    weights = list(model.parameters())
    if any(weight.device.type == "meta" or hasattr(weight, "ds_id") for weight in weights):
        return None  # not here yet, or in pieces: nothing to try
    difference = _tried_out(model, config)
    if not difference <= _SAME:  # NaN is no agreement
        return f"{type(model).__name__} ignores the mask (its hidden states differ by {difference:.0%})"
    return None


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A model in evaluation mode and without gradients; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def keeps_apart(model: PreTrainedModel, flatten: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> bool:
    """Whether rows that stand one behind another in a sequence do not see each other; tried out on a few tokens.

    Args:
        flatten: Makes a batch of one sequence of rows of `input_ids`.
    """
    weights = list(model.parameters())
    if any(weight.device.type == "meta" or hasattr(weight, "ds_id") for weight in weights):
        return True  # not here yet, or in pieces: nothing to try
    ids = [[(place * 7 + first) % model.config.get_text_config().vocab_size for place in range(8)] for first in (2, 5)]
    device = model.get_input_embeddings().weight.device
    backbone: Any = model.base_model
    states = []
    with evaluating(model):
        for rows in ([ids[0], ids[1]], [ids[1], ids[1]]):
            batch = flatten([{"input_ids": row} for row in rows])
            del batch["labels"]
            inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
            states.append(backbone(**inputs, use_cache=False).last_hidden_state[:, 8:].float())
    return bool((states[0] - states[1]).norm() <= _APART * states[1].norm())


def several_tokens(trie: TokenTrie, refusal: str | None) -> str:
    """What a grid of several tokens costs in training: a message."""
    nodes = len(trie.nodes) - 1
    if refusal is None:
        return f"a score is several tokens: each adds {nodes} token(s) to the single forward pass"
    ends = sum(not any(other[:-1] == node for other in trie.nodes) for node in trie.nodes[1:])
    return (
        f"a score is several tokens, and {refusal}: each costs {ends} more forward pass(es) over its row. The result "
        "is the same"
    )


def _tried_out(model: PreTrainedModel, config: Any) -> float:
    """How far the hidden states of branches are from those of further forward passes, relative to their size."""
    trie = TokenTrie.from_paths([(0, 0, 0), (0, 0, 1), (0, 1), (1, 0)])
    device = model.get_input_embeddings().weight.device
    # Any tokens do, as long as they differ.
    input_ids = (torch.arange(24, device=device).reshape(2, 12) * 7 + 2) % config.vocab_size
    score_positions = torch.zeros(2, 11, dtype=torch.bool, device=device)
    score_positions[0, [4, 8]] = score_positions[1, 6] = True
    backbone: Any = model.base_model
    with evaluating(model):
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
        wanted = further_forwards(backbone, inputs, score_positions, trie)
        tree = TreePass(trie, score_positions, config, share=True)
        try:
            _, extended = tree.extend(backbone, (), inputs)
            found: Any = tree.split(backbone(**extended))
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError):
            return float("inf")
    return float((found - wanted).norm() / wanted.norm())
