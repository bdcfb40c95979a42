"""Hidden states behind every inner node of a grid's trie, for all scores of a batch.

In one forward pass: the nodes are appended behind each row as branches, with the positions that they would have in
place and a mask through which each sees the row up to its score and its own ancestors. Where a model's attention takes
no such mask, in further forward passes over the row up to its score and each branch: slow, and the same numbers.

Knows attention masks; knows nothing of losses, heads or trainers.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trl_tract.scale.trie import TokenTrie

_MASKED = ("sdpa", "eager")
_LAYERS = {"full_attention", "sliding_attention"}
# Largest difference of the two ways, relative to the hidden states: far above the rounding of 16 bits, far below that
# of a branch that sees what it must not.
_SAME = 0.1


@dataclass(frozen=True)
class ScorePlaces:
    """The scores of a batch. S scores in B rows of L tokens.

    Attributes:
        rows: The row of each, `(S,)`, ascending.
        starts: Index of its first token, `(S,)`, ascending within a row.
        slots: Its number within its row, `(S,)`.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, score_positions: torch.Tensor) -> "ScorePlaces":
        """From the mask that is True where the next token is a score's first, bool `(B, L - 1)` or `(B, L)`."""
        rows, before = score_positions.nonzero(as_tuple=True)
        slots = score_positions.long().cumsum(dim=1)[rows, before] - 1
        return cls(rows, before + 1, slots)


class Branches:
    """Branches behind the rows of one batch: extends what goes into the backbone, and takes apart what comes out.

    Args:
        trie: Of the grid.
        score_positions: True where the next token is a score's first, bool `(B, L - 1)`; or `(B, L)` where a score
            has yet to be written.
        config: Of the language model; says which layers see a window alone, and how masks are written.
    """

    def __init__(self, trie: TokenTrie, score_positions: torch.Tensor, config: Any) -> None:
        self.places = ScorePlaces.of(score_positions)
        self.length = 0  # L, once it is seen
        self.config = config
        self.nodes = trie.nodes[1:]
        per_row = int(score_positions.sum(dim=1).max()) if score_positions.numel() else 0
        self.shape = (score_positions.shape[0], per_row, len(self.nodes))

    def extend(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """A forward pre-hook of the backbone that appends the branches."""
        # Some models hand `input_ids` to their backbone by its place.
        kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        input_ids = kwargs["input_ids"]
        self.length = input_ids.shape[1]
        device, (rows, per_row, count) = input_ids.device, self.shape
        places = self.places
        before, position_ids, kept, documents = _described(kwargs)
        # Slots without a score hold a branch that sees itself alone.
        starts = torch.zeros(rows, per_row, dtype=torch.long, device=device)
        starts[places.rows, places.slots] = places.starts
        depths = torch.tensor([len(node) for node in self.nodes], device=device)
        first = position_ids.gather(1, (starts - 1).clamp(min=0))  # (B, R): of the last token before a score
        positions = torch.cat([position_ids, (first[..., None] + depths).flatten(1)], dim=1)
        tokens = torch.tensor([node[-1] for node in self.nodes], device=device).expand(rows, per_row, count)

        index = torch.arange(self.length, device=device)
        sees_row = (index < starts[..., None]) & kept[:, None]  # (B, R, L)
        sees_row &= documents[:, None] == documents.gather(1, (starts - 1).clamp(min=0))[..., None]
        ancestors = torch.tensor(
            [[node[: len(other)] == other for other in self.nodes] for node in self.nodes], device=device
        )
        visible = torch.zeros(rows, positions.shape[1], positions.shape[1], dtype=torch.bool, device=device)
        visible[:, : self.length, : self.length] = before
        visible[:, self.length :, : self.length] = sees_row.repeat_interleave(count, dim=1)
        own = torch.eye(per_row, dtype=torch.bool, device=device)
        visible[:, self.length :, self.length :] = torch.kron(own, ancestors)
        distance = positions[:, :, None] - positions[:, None, :]

        dtype = module.get_input_embeddings().weight.dtype
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_PACKED_KERNELS}
        kwargs["input_ids"] = torch.cat([input_ids, tokens.flatten(1)], dim=1)
        kwargs["position_ids"] = positions
        kwargs["attention_mask"] = layer_masks(self.config, visible, distance, dtype)
        return (), kwargs

    def split(self, output: Any) -> torch.Tensor:
        """Cut the branches off a backbone's output, and return their hidden states, `(S, N - 1, H)`."""
        hidden_states: torch.Tensor = output.last_hidden_state  # (B, L + M, H)
        rows, per_row, count = self.shape
        branches = hidden_states[:, self.length :].reshape(rows, per_row, count, hidden_states.shape[-1])
        output.last_hidden_state = hidden_states[:, : self.length]
        if getattr(output, "router_logits", None) is not None:
            # The load balance of a mixture of experts is that of the rows themselves.
            total = hidden_states.shape[1]
            output.router_logits = tuple(
                logits.reshape(rows, total, -1)[:, : self.length].reshape(rows * self.length, -1)
                for logits in output.router_logits
            )
        return branches[self.places.rows, self.places.slots]


# Padding-free kernels read the documents from these; a mask says it all.
_OF_PACKED_KERNELS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def _described(kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a batch's tokens see, `(B, L, L)`; their positions, what is no padding, their documents, `(B, L)` each."""
    input_ids: torch.Tensor = kwargs["input_ids"]
    padding, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    rows, length = input_ids.shape
    index = torch.arange(length, device=input_ids.device)
    documents = torch.zeros_like(input_ids)
    if position_ids is None:
        position_ids = index.expand(rows, length)
    elif padding is None:
        # The rule by which transformers finds packed rows: a document begins where positions do not go on.
        jumps = position_ids.diff(prepend=position_ids[:, :1] - 1, dim=1) != 1
        documents = jumps.cumsum(dim=1).expand(rows, length)
    kept = torch.ones_like(input_ids, dtype=torch.bool) if padding is None else padding.bool()
    before = (index <= index[:, None]) & kept[:, None] & (documents[:, :, None] == documents[:, None])
    # A token of left padding sees itself, or its softmax would be over nothing.
    return before | (index == index[:, None]), position_ids.expand(rows, length), kept, documents


def layer_masks(config: Any, visible: torch.Tensor, distance: torch.Tensor, dtype: torch.dtype) -> Any:
    """Write what each token sees as the masks that a model's layers take.

    Args:
        config: Of the language model.
        visible: bool `(B, T, T)`, queries by keys.
        distance: Positions from key to query, `(B, T, T)`.
        dtype: Of the hidden states.

    Returns:
        `(B, 1, T, T)`: bool for sdpa, else 0 and the lowest number; by the type of layer where types differ.
    """

    def written(mask: torch.Tensor) -> torch.Tensor:
        if config._attn_implementation == "sdpa":
            return mask[:, None]
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[
            :, None
        ]

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if window is None or (types and "sliding_attention" not in types):
        return written(visible)
    seen = visible & (distance < window)
    if not types:
        return written(seen)
    return {"full_attention": written(visible), "sliding_attention": written(seen)}


def further_forwards(
    backbone: Any, inputs: dict[str, Any], score_positions: torch.Tensor, trie: TokenTrie
) -> torch.Tensor:
    """Hidden states behind each inner node but the root, `(S, N - 1, H)`, without a mask of our own.

    Args:
        backbone: Called with rows that are padded to the right.
        inputs: What the model was called with: `input_ids` and, if they are there, `attention_mask`, `position_ids`.
        score_positions: True where the next token is a score's first, bool `(B, L - 1)`.
        trie: Of the grid.
    """
    places = ScorePlaces.of(score_positions)
    input_ids = inputs["input_ids"]
    before, position_ids, _, _ = _described(inputs)
    nodes = trie.nodes[1:]
    # A pass over a branch's end serves all nodes on the way.
    ends = [node for node in nodes if not any(other[:-1] == node for other in nodes)]
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    lengths: list[int] = []
    for row, start in zip(places.rows.tolist(), places.starts.tolist(), strict=True):
        seen = before[row, start - 1]
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
    others = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if others or getattr(model, "_is_stateful", False):
        kinds = ", ".join(sorted(others)) or config.model_type
        return f"it has layers that are no plain attention ({kinds})"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention looks ahead"
    weights = list(model.parameters())
    if any(weight.device.type == "meta" or hasattr(weight, "ds_id") for weight in weights):
        return None  # not here yet, or in pieces: nothing to try
    difference = _tried_out(model, config)
    if not difference <= _SAME:  # NaN is no agreement
        return f"{type(model).__name__} does not follow a mask (its hidden states differ by {difference:.0%})"
    return None


def several_tokens(trie: TokenTrie, refusal: str | None) -> str:
    """What a grid of several tokens costs in training: a message."""
    nodes = len(trie.nodes) - 1
    if refusal is None:
        return f"a score is several tokens: each adds {nodes} token(s) to the forward pass, which stays the only one"
    ends = sum(not any(other[:-1] == node for other in trie.nodes) for node in trie.nodes[1:])
    return (
        f"a score is several tokens, and {refusal}: each costs {ends} more forward pass(es) over its row. The result "
        "is the same"
    )


@torch.no_grad()
def _tried_out(model: PreTrainedModel, config: Any) -> float:
    """How far the hidden states of branches are from those of further forward passes, relative to their size."""
    trie = TokenTrie.from_paths([(0, 0, 0), (0, 0, 1), (0, 1), (1, 0)])
    device = model.get_input_embeddings().weight.device
    # Any tokens do, as long as they differ.
    input_ids = (torch.arange(24, device=device).reshape(2, 12) * 7 + 2) % config.vocab_size
    score_positions = torch.zeros(2, 11, dtype=torch.bool, device=device)
    score_positions[0, [4, 8]] = score_positions[1, 6] = True
    backbone: Any = model.base_model
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
        wanted = further_forwards(backbone, inputs, score_positions, trie)
        branches = Branches(trie, score_positions, config)
        try:
            _, extended = branches.extend(backbone, (), inputs)
            found = branches.split(backbone(**extended))
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError):
            return float("inf")
    finally:
        for module, training in modes:
            module.training = training
    return float((found - wanted).norm() / wanted.norm())
