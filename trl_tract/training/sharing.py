"""Batches of rows that share a beginning, and what users of `share_prompts` are told. Knows nothing of models."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftConfig
from torch.utils.data import Sampler

from trl_tract.backends.tree import lay_out, placed
from trl_tract.training.config import TRACTConfig

Keys = NDArray[np.uint64]

_BLOCK, _BLOCKS = 64, 32  # tokens after which, and how often, rows are looked at for a common beginning
_LOOKED_AT = 64  # micro-batches from which the savings are told


class SharingSampler(Sampler[int]):
    """Rows in an order whose micro-batches hold what shares a prompt, themselves in random order.

    An update of several micro-batches, by accumulation or on several ranks, therefore mixes prompts. The order follows
    from seed and epoch alone, so that every rank has the same and a training that goes on has that of before. A prompt
    with more rows than there is room for is parted; only the last micro-batch may be short.

    Args:
        keys: What begins alike has the same first keys, and the same prompt the same last one; see `beginnings`.
    """

    def __init__(self, keys: Keys, batch_size: int, seed: int) -> None:
        self.keys, self.batch_size, self.seed, self.epoch = keys, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the host at each epoch's start."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        # Keys in another order each epoch: what begins alike stays together, at every length.
        shuffled = _scrambled(self.keys ^ rng.integers(2**64, size=1, dtype=np.uint64))
        order = np.lexsort([rng.random(len(self.keys)), *shuffled.T[::-1]])
        ends = np.flatnonzero((shuffled[order][1:] != shuffled[order][:-1]).any(axis=1)) + 1
        batches = _filled([group.tolist() for group in np.split(order, ends)], self.batch_size)
        last = [batch for batch in batches if len(batch) < self.batch_size]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        for number in rng.permutation(len(whole)):
            yield from whole[number]
        yield from (row for batch in last for row in batch)


def _filled(groups: Sequence[list[int]], size: int) -> list[list[int]]:
    """Batches of `size` rows in which groups are whole, as far as that goes; the last one may be short."""
    batches: list[list[int]] = []
    by_room: dict[int, list[list[int]]] = {room: [] for room in range(size + 1)}
    for group in groups:
        batches += [group[at : at + size] for at in range(0, len(group) - size + 1, size)]
        if rest := group[len(group) - len(group) % size :]:
            room = next((room for room in range(len(rest), size) if by_room[room]), size)
            batch = by_room[room].pop() if room < size else []
            batch += rest
            by_room[size - len(batch)].append(batch)
    batches += by_room[0]
    left = [row for room in range(1, size) for batch in by_room[room] for row in batch]
    return batches + [left[at : at + size] for at in range(0, len(left), size)]


def _scrambled(keys: Keys) -> Keys:
    """A one-to-one map without any pattern (the finalizer of SplitMix64)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def beginnings(rows: Dataset, *, questions: bool) -> Keys:
    """Keys of what rows begin with, `(n, K)`: of the prompt alone, or of every 64 tokens of it before that.

    Args:
        rows: With `input_ids` and `labels`; the prompt is what stands before the first label.
        questions: Whether rows of other prompts that begin alike belong together as well.
    """
    keys = np.zeros((len(rows), _BLOCKS + 1 if questions else 1), np.uint64)
    number = 0
    for table in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000):
        for row in range(len(table)):
            ids, labels = (table[name][row].values.to_numpy(zero_copy_only=False) for name in ("input_ids", "labels"))
            labelled = np.flatnonzero(labels != -100)
            prompt = ids[: labelled[0] if len(labelled) else len(ids)]
            # Not Python's own hash, which differs from rank to rank.
            seen = hashlib.blake2b(digest_size=8)
            last = min(len(prompt) // _BLOCK, keys.shape[1] - 1)
            for block in range(last):
                seen.update(prompt[block * _BLOCK : (block + 1) * _BLOCK].tobytes())
                keys[number, block] = int.from_bytes(seen.digest(), "little")
            seen.update(prompt[last * _BLOCK :].tobytes())
            keys[number, last:] = int.from_bytes(seen.digest(), "little")
            number += 1
    return keys


def sharing_sampler(rows: Any, args: TRACTConfig, batch_size: int) -> SharingSampler | None:
    """The sampler of rows that are trained on, if micro-batches are to be made of them that share."""
    in_order = args.train_sampling_strategy != "random" or args.share_batches == "none"
    # What was packed stands together as it was packed, and a stream comes as it comes.
    if in_order or batch_size == 1 or args.packing or not isinstance(rows, Dataset):
        return None
    keys = beginnings(rows, questions=args.share_batches == "question")
    return SharingSampler(keys, batch_size, args.seed if args.data_seed is None else args.data_seed)


def savings(rows: Dataset, order: Sequence[int], batch_size: int, attention: float) -> str:
    """What sharing saves in the micro-batches of an order, as a sentence; from the first 64 of them."""
    separate = shared = count = 0
    for at in range(0, min(len(order), _LOOKED_AT * batch_size), batch_size):
        batch = [np.array(ids) for ids in rows[list(order[at : at + batch_size])]["input_ids"]]
        sequences = [placed(ids) for ids in batch]
        layout, _ = lay_out(sequences, range(len(batch)), share=True, attention=attention)
        separate += sum(map(len, batch))
        shared += len(np.unique(np.concatenate(layout.places)))
        count += 1
    return (
        f"share_prompts: of {separate:,} tokens in {count} micro-batch(es) of {batch_size} rows, {shared:,} are "
        f"computed ({shared / separate:.0%})"
    )


def sharing_warnings(refusal: str | None, adapter: PeftConfig | None, args: TRACTConfig) -> list[str]:
    """What users of `share_prompts` have to know: that this model cannot, or what differs from separate rows."""
    if refusal is not None:
        return [f"share_prompts has no effect: {refusal}. Each row is computed separately, with the same result"]
    if args.train_batch_size == 1 and not args.packing:
        return [
            "share_prompts has no effect with micro-batches of one row. Raise per_device_train_batch_size, and lower "
            "gradient_accumulation_steps by the same factor"
        ]
    dropout = getattr(adapter, "lora_dropout", 0.0)
    if dropout:
        return [
            f"share_prompts: with lora_dropout={dropout:g}, rows with a shared prefix also share its dropout mask. "
            "Updates are the same on average"
        ]
    return []
