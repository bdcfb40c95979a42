"""The judge's loop: for each scale in turn a rationale, and the score behind it.

A training row has a gold score before its next rationale; here the judge's own decided score stands there, as the
nearest text of the grid. Every sampled completion goes its own way. Knows nothing of training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trl_tract.backends import Generation, Stop
from trl_tract.backends.base import reusing
from trl_tract.backends.grid_scores import grid_probabilities
from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.files.journal import digest
from trl_tract.judge.judgement import Judgement
from trl_tract.judge.scoring import NO_ROOM, Rule, Sampler
from trl_tract.rows.frame import Frame
from trl_tract.rows.template import Asked, Template
from trl_tract.rows.thinking import answered, may_end, read_rationale, stop_rules
from trl_tract.rows.tokens import asked_ids, prefix_ids
from trl_tract.scale.scale import Scale, scored_within
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.text.progress import Passes


@dataclass
class _Chain:
    """One completion under way: what is written of it, and why it does not go on."""

    item: int
    sample: int
    asked: Asked
    done: list[tuple[str, str]] = field(default_factory=list)  # rationale and score text, by scale
    rationale: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Loop:
    """What is the same for all items that are judged.

    Attributes:
        recalibrations: Name of a scale -> what is applied to its final scores.
    """

    template: Template
    scales: tuple[Scale, ...]
    sampler: Sampler
    rule: Rule
    recalibrations: Mapping[str, Recalibration]
    num_generations: int

    def run(
        self, asked: Mapping[int, Asked], seeds: Mapping[int, int], report: Callable[[int], None]
    ) -> dict[int, Judgement]:
        """A judgement for each item. It depends on the item's prompt and seed, and on no other item."""
        with reusing(self.sampler.backend):
            return self._judge(asked, seeds, report)

    def _judge(
        self, asked: Mapping[int, Asked], seeds: Mapping[int, int], report: Callable[[int], None]
    ) -> dict[int, Judgement]:
        ids = {item: asked_ids(self.template, each) for item, each in asked.items()}
        drawn = {item: digest([seeds[item], list(own)]) for item, own in ids.items()}
        chains = {item: [_Chain(item, n, asked[item]) for n in range(self.num_generations)] for item in ids}
        judged: dict[int, dict[str, Judgement]] = {item: {} for item in ids}
        passes = Passes(report, len(ids), 2 * len(self.scales))
        for number, scale in enumerate(self.scales):
            going = [chain for own in chains.values() for chain in own if chain.error is None]
            self._write(number, going, ids, drawn, passes)
            self._score(number, going, judged, drawn)
            passes.add(len(ids))
            for item, own in chains.items():
                if scale.name not in judged[item]:
                    judged[item][scale.name] = Judgement(error=own[-1].error)
        passes.finish()
        return {item: self._whole(judged[item], chains[item]) for item in ids}

    def _write(
        self,
        number: int,
        going: Sequence[_Chain],
        ids: Mapping[int, Sequence[int]],
        drawn: Mapping[int, str],
        passes: Passes,
    ) -> None:
        """Write the next rationale of each completion that goes on, or the reason why there is none."""
        sampler, scale = self.sampler, self.scales[number]
        # Thinking stands before the first rationale alone.
        frames = {chain.item: chain.asked.frame for chain in going} if number == 0 else {}
        stop = Stop.at(scale, **stop_rules(frames.values() if number == 0 else [Frame()]))

        def rejects(key: int, text: str) -> bool:
            frame = frames.get(key, Frame())
            return not may_end(frame, text) or scored_within(answered(frame, text), self.scales) is not None

        options: dict[str, Any] = {"rejects": rejects}
        if number == 0:
            options["seed"] = lambda item, attempt: [drawn[item], attempt]
            sampled = sampler.sample(ids, stop, n=self.num_generations, on_progress=passes.add, **options)
            generations = [each for own in sampled.values() for each in own]
        else:
            asked = {place: own for place, chain in enumerate(going) if (own := self._prefix(chain, None)) is not None}
            chains, going = going, [going[place] for place in asked]

            def seed(place: int, attempt: int) -> list[Any]:
                return [drawn[chains[place].item], attempt, chains[place].sample, number]

            def tell(count: int) -> None:
                passes.add(count / self.num_generations)

            sampled = sampler.sample(asked, stop, n=1, seed=seed, on_progress=tell, **options)
            generations = [own[0] for own in sampled.values()]
        for chain, generation in zip(going, generations, strict=True):
            self._take(chain, generation, number)

    def _take(self, chain: _Chain, generation: Generation, number: int) -> None:
        frame, scale = chain.asked.frame if number == 0 else Frame(), self.scales[number]
        written = self.sampler.rationale(generation, scale)
        chain.rationale = read_rationale(frame, written)
        early = scored_within(answered(frame, written), self.scales)
        if not self.sampler.usable(generation):
            chain.error = self.sampler.reason(generation, scale)
        elif self.sampler.writes and not may_end(frame, written) and not self.sampler.append_marker:
            chain.error = "the model wrote the marker inside its thinking"
        elif early is not None:
            which = f"a score of aspect {early.name!r}" if early.name else "a score already"
            chain.error = f"the rationale before {scale.marker!r} holds {which}"

    def _score(
        self, number: int, going: Sequence[_Chain], judged: Mapping[int, dict[str, Judgement]], drawn: Mapping[int, str]
    ) -> None:
        """Judge what was written, and put the score that was decided behind it."""
        scale = self.scales[number]
        prefixes = {
            place: ids
            for place, chain in enumerate(going)
            if chain.error is None and (ids := self._prefix(chain, chain.rationale)) is not None
        }
        found = grid_probabilities(self.sampler.backend, scale.grid, list(prefixes.values()))
        scored: dict[int, list[int]] = {}
        for slot, (place, fault) in enumerate(zip(prefixes, found.faults, strict=True)):
            going[place].error = NO_ROOM if np.isnan(found.probs[slot]).any() else fault
            if going[place].error is None:
                scored.setdefault(going[place].item, []).append(slot)
        places = list(prefixes)
        for item, slots in scored.items():
            judgement = judged[item][scale.name] = Judgement()
            own = [going[places[slot]] for slot in slots]
            seed = [drawn[item], number]
            rationales = [chain.rationale for chain in own]
            recalibration = self.recalibrations.get(scale.name)
            self.rule.fill(judgement, scale.grid, found.of(slots), rationales, seed, recalibration)
            for chain, score in zip(own, judgement.scores, strict=True):
                chain.done.append((chain.rationale, scale.grid.nearest_text(score)))

    def _prefix(self, chain: _Chain, rationale: str | None) -> list[int] | None:
        """Tokens up to the next score, or, without a rationale, to where it begins; None if there are none."""
        try:
            return prefix_ids(self.template, chain.asked, self.scales, chain.done, rationale)
        except ScoreNotFoundError as error:
            chain.error = f"the rationale cannot be scored: {error}"
            return None

    def _whole(self, judged: dict[str, Judgement], chains: Sequence[_Chain]) -> Judgement:
        """The judgement of an item: the only scale's, or one that holds them all."""
        if "" in judged:
            return judged[""]
        whole = [chain.done for chain in chains if chain.error is None]
        rationales = [
            "".join(scale.format.join(*piece) for scale, piece in zip(self.scales, done, strict=True)) for done in whole
        ]
        without = [f"aspect {name!r}: {own.error}" for name, own in judged.items() if own.error]
        return Judgement(rationales=rationales, error="; ".join(without) or None, aspects=judged)
