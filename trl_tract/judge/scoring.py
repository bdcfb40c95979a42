"""The parts of judging: sampling rationales, asking for a grid's probabilities, making scores of them.

Knows backends and grids; knows nothing of prompts, of how a row is written, or of how many scores a completion has.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from trl_tract.backends import Backend, Generation, Sampling, Stop
from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.files.journal import seed_of
from trl_tract.judge.judgement import Judgement
from trl_tract.scale.decisions import DECISIONS, POOLS, Decision, Pool, check_quantile, decide, temper
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale
from trl_tract.scale.trie import GridProbabilities

logger = logging.getLogger(__name__)

Key = TypeVar("Key")
NO_ROOM = "prompt and rationale leave no room in the model's context window"


def check_without_rationales(num_generations: int) -> None:
    """Refuse several rationales of a judge that writes none: its probabilities are the same each time."""
    if num_generations > 1:
        raise ValueError(
            f"num_generations={num_generations}, but this judge writes no rationales, so it has one score for each "
            "item. Leave num_generations out"
        )


@dataclass(frozen=True)
class Sampler:
    """Samples rationales, and again those that did not reach their score.

    Attributes:
        append_marker: Whether a rationale without the marker is as good.
        writes: False for a judge that gives its scores straight away: its rationales are empty.
    """

    backend: Backend
    options: Mapping[str, Any]
    max_attempts: int
    append_marker: bool
    writes: bool

    def check(self, num_generations: int, marker: str, known: Mapping[str, inspect.Parameter]) -> None:
        """Check settings against each other, and say which have no effect.

        Args:
            known: All settings with their defaults.

        Raises:
            ValueError: The same rationale, or the same score without any, would come several times.
        """
        if self.writes:
            Sampling(**self.options).check(num_generations, marker)
            return
        check_without_rationales(num_generations)
        given = {**self.options, "max_attempts": self.max_attempts, "append_marker": self.append_marker}
        if idle := [name for name, value in given.items() if value != known[name].default]:
            logger.warning("this judge writes no rationales, so %s cannot have an effect", ", ".join(idle))

    def sample(
        self,
        prompts: Mapping[Key, Sequence[int]],
        stop: Stop,
        *,
        n: int,
        seed: Callable[[Key, int], Sequence[Any]],
        rejects: Callable[[Key, str], bool],
        on_progress: Callable[[int], None],
    ) -> dict[Key, list[Generation]]:
        """Rationales of each prompt.

        Args:
            seed: What the random numbers of a prompt's attempt (1, 2, ...) depend on.
            rejects: Whether a rationale that did reach its score has to be sampled again.
        """
        if not prompts or not self.writes:
            return {key: [Generation("", "stop", 0)] * n for key in prompts}
        results: dict[Key, list[Generation]] = {}
        open_slots = [(key, sample) for key in prompts for sample in range(n)]
        for attempt in range(1, self.max_attempts + 1):
            settings: dict[str, Any] = {**self.options, "stop": stop}
            if attempt == 1:
                settings["seed"] = [seed_of(*seed(key, attempt)) for key in prompts]
                first = self.backend.generate(list(prompts.values()), n=n, on_progress=on_progress, **settings)
                results = {key: list(generations) for key, generations in zip(prompts, first, strict=True)}
            else:
                settings["seed"] = [seed_of(*seed(key, attempt), sample) for key, sample in open_slots]
                again = self.backend.generate([prompts[key] for key, _ in open_slots], n=1, **settings)
                for (key, sample), generations in zip(open_slots, again, strict=True):
                    results[key][sample] = generations[0]
            open_slots = [(key, one) for key, one in open_slots if self._is_open(results[key][one], key, rejects)]
            if not open_slots or self.append_marker:
                break
        return results

    @staticmethod
    def _is_open(generation: Generation, key: Key, rejects: Callable[[Key, str], bool]) -> bool:
        if generation.finish_reason == "stop":
            return rejects(key, generation.text)
        return generation.finish_reason != "prompt_too_long"

    def usable(self, generation: Generation) -> bool:
        """Whether a score can follow."""
        return generation.finish_reason == "stop" or (
            self.append_marker and generation.finish_reason != "prompt_too_long"
        )

    def rationale(self, generation: Generation, scale: Scale) -> str:
        """What was written before the score; with `append_marker` perhaps before a marker without one."""
        before, marker, _ = generation.text.rpartition(scale.marker)
        return (before if marker and generation.finish_reason != "stop" else generation.text).rstrip()

    def reason(self, last: Generation, scale: Scale) -> str:
        """Why no score can follow a generation that is not usable."""
        if last.finish_reason == "prompt_too_long":
            return "the prompt leaves no room in the model's context window"
        ending = {
            "length": f"max_new_tokens={self.options['max_new_tokens']} ran out",
            "eos": "the model ended its turn",
        }
        attempts = f"in {self.max_attempts} attempts: {ending[last.finish_reason]}"
        mentioned = " with a score" if scale.marker in last.text else ""
        return f"no rationale reached {scale.marker!r}{mentioned} {attempts}"


@dataclass(frozen=True)
class Rule:
    """How probabilities become scores; the fields are arguments of `CoTRAILJudge`.

    Raises:
        ValueError: An unknown decision or pool, or a temperature or quantile out of range.
    """

    decision: Decision
    quantile: float
    normalize_grid: bool
    score_temperature: float
    pool: Pool

    def __post_init__(self) -> None:
        """Refuse what is unusable before anything is generated."""
        if self.decision not in DECISIONS:
            raise ValueError(f"decision={self.decision!r} is unknown: choose one of {', '.join(DECISIONS)}")
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r} is unknown: choose one of {', '.join(POOLS)}")
        check_quantile(self.quantile)
        if self.decision != "quantile" and self.quantile != 0.5:
            raise ValueError(
                f"quantile={self.quantile} has no effect with decision={self.decision!r}. Set decision='quantile', or "
                "leave quantile out"
            )
        temper(torch.ones(1), self.score_temperature)

    def fill(
        self,
        judgement: Judgement,
        grid: ScoreGrid,
        found: GridProbabilities,
        rationales: list[str],
        seed: Sequence[Any],
        recalibration: Recalibration | None = None,
    ) -> None:
        """Write into a judgement what the probabilities behind its rationales say."""
        probs = found.probs
        tensor, values = torch.from_numpy(probs), torch.tensor(grid.values, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed_of("score", *seed))
        tensor = temper(tensor, self.score_temperature)
        rule: dict[str, Any] = {"normalize": self.normalize_grid, "quantile": self.quantile, "generator": generator}
        judgement.scores = decide(tensor, values, self.decision, **rule).tolist()
        judgement.score = float(np.mean(judgement.scores))
        if self.pool == "distributions":
            judgement.score = float(decide(tensor.mean(dim=0, keepdim=True), values, self.decision, **rule))
        if recalibration is not None:
            judgement.score = float(recalibration(judgement.score))
        judgement.rationales = rationales
        judgement.probs = probs
        judgement.error = None
        judgement.grid_mass = float(probs.sum(axis=1).mean())
        on_grid = probs / probs.sum(axis=1, keepdims=True)
        mean = on_grid @ np.array(grid.values)
        variance = on_grid @ np.square(grid.values) - np.square(mean)
        judgement.std = float(np.sqrt(np.clip(variance, 0, None)).mean())
        judgement.pruned_mass = float(found.pruned_mass.mean())
        judgement.error_bound = float(self._error_bounds(grid, found).mean())

    def _error_bounds(self, grid: ScoreGrid, found: GridProbabilities) -> NDArray[np.float64]:
        """How far what was not followed can have moved each expected score, rubric units."""
        if not self.normalize_grid:
            return found.error_bound
        # A mean over the mass m that was found moves by at most the range once mass p joins it: p / (m + p) of it.
        low, high = grid.values[0], grid.values[-1]
        mass = np.maximum(found.probs.sum(axis=1) + found.pruned_mass, np.finfo(float).tiny)
        bounds: NDArray[np.float64] = found.pruned_mass / mass * (high - low)
        return bounds
