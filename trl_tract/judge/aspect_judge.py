"""Judging completions with several scores: rationale, score, next rationale behind that score, and so on.

A training row has a gold score before its second rationale; here the judge's own decided score stands there, as the
nearest text of the grid. Every sampled completion goes its own way. Knows nothing of training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trl_tract.backends import Generation
from trl_tract.judge.judgement import Judgement
from trl_tract.judge.scoring import NO_ROOM, Rule, Sampler, grid_probabilities
from trl_tract.rows.row import Prompt
from trl_tract.rows.tokens import aspect_prefix_ids
from trl_tract.scale.scale import Scale, scored_within


@dataclass
class _Chain:
    """One completion under way: what is written of it, and why it does not go on."""

    item: int
    done: list[tuple[str, str]] = field(default_factory=list)  # rationale and score text, by aspect
    rationale: str = ""
    error: str | None = None


def judge_aspects(
    prompts: Mapping[int, Prompt],
    ids: Mapping[int, Sequence[int]],
    aspects: Sequence[Scale],
    *,
    sampler: Sampler,
    rule: Rule,
    num_generations: int,
    first: int,
) -> dict[int, Judgement]:
    """A judgement for each item, with one for each aspect in it.

    Args:
        prompts: Item -> its prompt.
        ids: Item -> the prompt's tokens.
        aspects: In their order, with tokens.
        sampler: Samples the rationales.
        rule: Makes scores of probabilities.
        num_generations: Completions of each item.
        first: Number of the first item where the items are a part of more.
    """
    tokenizer = sampler.backend.tokenizer
    chains = [_Chain(item) for item in ids for _ in range(num_generations)]
    found: dict[int, Judgement] = {item: Judgement() for item in ids}
    for number, aspect in enumerate(aspects):
        going = [chain for chain in chains if chain.error is None]
        generations = _next_rationales(
            going, prompts, ids, aspects, number, sampler=sampler, rule=rule, n=num_generations, first=first
        )
        _write(going, generations, aspects, number, sampler)
        written = [chain for chain in going if chain.error is None]
        prefixes = [
            aspect_prefix_ids(tokenizer, prompts[chain.item], aspects, chain.done, chain.rationale) for chain in written
        ]
        probabilities = grid_probabilities(sampler.backend, aspect.grid, prefixes)
        for chain, probs in zip(written, probabilities.probs, strict=True):
            if np.isnan(probs).any():
                chain.error = NO_ROOM
        for item, judgement in found.items():
            mine = [place for place, chain in enumerate(written) if chain.item == item and chain.error is None]
            its = judgement.aspects[aspect.name] = Judgement()
            if not mine:
                its.error = next(chain.error for chain in chains if chain.item == item)
                continue
            rationales = [written[place].rationale for place in mine]
            rule.fill(its, aspect.grid, probabilities.of(mine), rationales, [first + item, aspect.name])
            for place, score in zip(mine, its.scores, strict=True):
                written[place].done.append((written[place].rationale, aspect.grid.nearest_text(score)))
    for item, judgement in found.items():
        whole = [chain.done for chain in chains if chain.item == item and chain.error is None]
        judgement.rationales = [
            "".join(aspect.format.join(*piece) for aspect, piece in zip(aspects, done, strict=True)) for done in whole
        ]
        without = [f"aspect {name!r}: {its.error}" for name, its in judgement.aspects.items() if its.error]
        judgement.error = "; ".join(without) or None
    return found


def _next_rationales(
    going: Sequence[_Chain],
    prompts: Mapping[int, Prompt],
    ids: Mapping[int, Sequence[int]],
    aspects: Sequence[Scale],
    number: int,
    *,
    sampler: Sampler,
    rule: Rule,
    n: int,
    first: int,
) -> list[Generation]:
    """The next piece of each completion that goes on."""

    def seed(attempt: int) -> list[Any]:
        return [rule.seed, first, attempt, number]

    def rejects(text: str) -> bool:
        return scored_within(text, aspects) is not None

    options: dict[str, Any] = {"stop": aspects[number].marker, "seed": seed, "rejects": rejects}
    if number == 0:
        sampled = sampler.sample(ids, n=n, **options)
        return [generation for generations in sampled.values() for generation in generations]
    tokenizer = sampler.backend.tokenizer
    asked = {
        place: aspect_prefix_ids(tokenizer, prompts[chain.item], aspects, chain.done)
        for place, chain in enumerate(going)
    }
    if not asked:
        return []
    return [generations[0] for generations in sampler.sample(asked, n=1, **options).values()]


def _write(
    going: Sequence[_Chain],
    generations: Sequence[Generation],
    aspects: Sequence[Scale],
    number: int,
    sampler: Sampler,
) -> None:
    """Add what was generated to the completions, or the reason why it cannot be."""
    for chain, generation in zip(going, generations, strict=True):
        chain.rationale = generation.text.rstrip()
        early = scored_within(chain.rationale, aspects)
        if not sampler.usable(generation):
            chain.error = sampler.reason(generation, aspects[number].marker)
        elif early is not None:
            chain.error = f"the rationale before {aspects[number].marker!r} holds a score of aspect {early.name!r}"
