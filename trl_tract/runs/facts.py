"""What a run's settings are derived from: its rows, its model and what it trains on, looked at."""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray

from trl_tract.backends.device import count_parameters, fastest_dtype
from trl_tract.backends.loading import tokenizer_to_train
from trl_tract.backends.tree import distinct_share, placed
from trl_tract.files.journal import write_json
from trl_tract.files.shards import Shard
from trl_tract.rows.dataset import find_scales
from trl_tract.rows.encoding import RowEncoder
from trl_tract.rows.rendering import settled
from trl_tract.rows.template import Template, TemplateSettings
from trl_tract.runs.spec import RunSpec
from trl_tract.scale.scale import Scale, read_scales
from trl_tract.sources.door import group_of, held_out_rows
from trl_tract.training.recipe import Device, Facts, derive

_LOOKED_AT = 2000
"""Rows whose tokens are counted, evenly spread: what settings hang on is known well enough from them."""
_COMPARED = 400
"""Of these, the rows whose tokens are compared with each other's."""
_TOGETHER = 4  # rows in a micro-batch that is tried


def facts_of(
    model: str, rows: Sequence[Mapping[str, Any]], training: Mapping[str, Any], revision: str | None = None
) -> Facts:
    """The facts about training `model` on `rows`, but for those that are held out to be judged in training."""
    scales = read_scales(training)
    tokenizer = tokenizer_to_train(model, training.get("chat_template_path"), revision)
    judged = training.get("judge_eval_items")
    held_out = held_out_rows(map(group_of, rows), judged, training.get("seed", 42)) if judged else set()
    trained_on = [place for place in range(len(rows)) if place not in held_out]
    looked_at = [rows[place] for place in trained_on[:: math.ceil(len(trained_on) / _LOOKED_AT)]]
    settings = settled(tokenizer, TemplateSettings.of_training(training), looked_at)
    encoder = RowEncoder(
        find_scales(Template(tokenizer, settings), looked_at, scales),
        None,
        tokenizer=tokenizer,
        settings=settings,
        drop_rationale=bool(training.get("drop_rationale")),
    )
    lengths, completions = [], []
    golds: list[list[float]] = []
    sequences: list[NDArray[np.int64]] = []
    every = math.ceil(len(looked_at) / _COMPARED)
    for row in looked_at:
        columns = encoder(row)
        if columns["refusal_kind"]:
            continue  # the training says what is wrong with it
        lengths.append(columns["num_tokens"])
        completions.append(sum(label != -100 for label in columns["labels"]))
        golds.append([score for score in columns["score_labels"] if not math.isnan(score)])
        if (len(lengths) - 1) % every == 0:
            sequences.append(placed(columns["input_ids"]))
    return measured(model, scales, len(trained_on), lengths, completions, golds, sequences, revision)


def write_recipe(spec: RunSpec, rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Derive what a run's user has not set, and write it down: see `Recipe.to_dict`."""
    write_json(file, derive(facts_of(spec.model, rows, spec.training, spec.revision), spec.set_by_user).to_dict())


def measured(
    model: str,
    scales: Sequence[Scale],
    rows: int,
    lengths: Sequence[int],
    completions: Sequence[int],
    golds: Sequence[Sequence[float]],
    sequences: Sequence[NDArray[np.int64]],
    revision: str | None = None,
) -> Facts:
    """The facts about rows whose tokens are counted already.

    Args:
        golds: Its gold scores, one for each scale, rubric units.
        sequences: Of some of them, token ids and positions, `(n, 2)`.

    Raises:
        ValueError: No row was looked at.
    """
    if not lengths:
        raise ValueError("no row can be used for training. trl-tract check shows why")
    names = [scale.name for scale in scales]
    return Facts(
        parameters=count_parameters(model, revision),
        rows=rows,
        tokens=float(np.mean(lengths)),
        longest=max(lengths),
        rationale=max(completions),
        variances=dict(zip(names, np.var(np.array(golds), axis=0).tolist(), strict=True)),
        spans={scale.name: float(scale.grid.values[-1] - scale.grid.values[0]) for scale in scales},
        device=this_device(),
        distinct=_distinct(sequences),
    )


def _distinct(sequences: Sequence[NDArray[np.int64]]) -> float:
    if not sequences:
        return 1.0
    mixed = random.Random(0).sample(sequences, len(sequences))
    batches = [mixed[start : start + _TOGETHER] for start in range(0, len(mixed), _TOGETHER)]
    tokens = [sum(map(len, batch)) for batch in batches]
    shares = [distinct_share(batch, len(batch)) for batch in batches]
    return float(np.average(shares, weights=tokens))


def this_device() -> Device:
    """What trains here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    on_cuda = accelerator is not None and accelerator.type == "cuda"
    memory = torch.cuda.get_device_properties(0).total_memory if on_cuda else psutil.virtual_memory().total
    return Device(
        kind="cpu" if accelerator is None else accelerator.type,
        memory=int(memory),
        bfloat16=fastest_dtype() == torch.bfloat16,
        processes=Shard.from_launcher().count,
    )
