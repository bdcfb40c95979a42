"""A sampled continuation -> what is trained on: its tokens up to the marker, and what then stands before the score.

Knows templates, tokens and where a stop text ends a text; knows nothing of rewards, models or trainers.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trl_tract.backends.base import Stop
from trl_tract.backends.stop_text import Ending
from trl_tract.rows.frame import Frame
from trl_tract.rows.template import Asked, Template
from trl_tract.rows.thinking import read_rationale, stop_rules
from trl_tract.rows.tokens import marker_prefix
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import ScoreNotFoundError


@dataclass(frozen=True)
class Rollout:
    """One sampled rationale.

    Attributes:
        ids: Its tokens behind the prompt, up to where its score would be; all that was sampled where it has no marker.
        sampled: How many of them, from the first, the model sampled. The rest stands between marker and score.
        scored: Whether a score can follow.
        logprobs: Of `ids`, nats, by the engine that sampled them, 0 for the rest; None where it does not tell.
        rewritten: Whether sampled tokens were replaced by those that a judge is asked with.
    """

    ids: list[int]
    sampled: int
    scored: bool
    logprobs: list[float | None] | None = field(default=None, repr=False)
    rewritten: bool = False


def marker_stop(scale: Scale, frames: Sequence[Frame]) -> Stop:
    """Where a rationale ends: at its first marker behind the thinking, whatever follows."""
    return Stop(scale.marker, (), **stop_rules(frames))


def as_rollout(
    template: Template, asked: Asked, scale: Scale, ids: Sequence[int], logprobs: Sequence[float | None] | None = None
) -> Rollout:
    """Cut a continuation at its marker, and go on to the score's place with the tokens that a judge is asked with.

    What was sampled stays as it was sampled: the policy's log-probabilities are of these tokens.
    """
    ending = Ending(template.tokenizer, marker_stop(scale, [asked.frame]))
    assert ending.stop is not None
    text = ending.decode(ids)
    place = ending.stop.place_in(text)
    without = Rollout(list(ids), len(ids), False, None if logprobs is None else list(logprobs))
    if place is None:
        return without
    end = place + len(scale.marker)
    count = bisect.bisect_left(range(len(ids)), end, key=lambda length: len(ending.decode(ids[:length])))
    own = list(ids[:count])
    try:
        prefix = marker_prefix(template, asked, scale, read_rationale(asked.frame, text[:place]))
    except ScoreNotFoundError:
        return without
    canonical, marker_stops = prefix.ids[prefix.prompt_length :], prefix.marker_stop - prefix.prompt_length
    if canonical[:count] == own:
        whole, sampled = canonical, count
    elif canonical[marker_stops - 1] == own[-1]:
        whole, sampled = own + canonical[marker_stops:], count
    else:
        # The marker's last token holds what may not stand in front of the score.
        whole = canonical
        alike = (one == other for one, other in zip(own, canonical, strict=False))
        sampled = len(list(itertools.takewhile(bool, alike)))
    told = None if logprobs is None else [*logprobs[:sampled], *[0.0] * (len(whole) - sampled)]
    return Rollout(whole, sampled, True, told, sampled < count)


def grouped(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Micro-batches of the same rows, those of a group side by side, groups in the order in which they come first."""
    whole = {
        name: torch.cat([batch[name] for batch in batches]) if value.ndim else value
        for name, value in batches[0].items()
    }
    groups = whole["group"].tolist()
    order = sorted(range(len(groups)), key=lambda row: groups.index(groups[row]))
    whole = {name: value[order] if value.ndim else value for name, value in whole.items()}
    size = len(order) // len(batches)
    return [
        {name: value[start : start + size] if value.ndim else value for name, value in whole.items()}
        for start in range(0, len(order), size)
    ]


def score_places(mask: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Where a score would be next: at the last token of each scored row, bool `(B, L)`."""
    index = torch.arange(mask.shape[1], device=mask.device)
    last = (index * mask).argmax(dim=1)
    return (index == last[:, None]) & scored[:, None]


def squared_error(*args: Any, **kwargs: Any) -> list[float]:
    """What GRPOTrainer takes for the reward function; `REALTrainer._calculate_rewards` stands in for it."""
    raise NotImplementedError("the reward is computed from the model that is trained")
