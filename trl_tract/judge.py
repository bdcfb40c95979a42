"""CoTRAILJudge: sample a rationale, then report the expected score (CoT-RAIL). Knows nothing of training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trl_tract.backends import Backend, Generation, TransformersBackend
from trl_tract.journal import digest
from trl_tract.judge_config import JudgeConfig
from trl_tract.prompts import CompletionFormat, Prompt
from trl_tract.recalibration import Recalibration
from trl_tract.rendering import prompt_ids, resolve_grid, score_prefix_ids, with_completion
from trl_tract.scores import DECISIONS, POOLS, Decision, Pool, ScoreGrid, decide, temper
from trl_tract.trie import GridProbabilities, walk_trie


@dataclass
class Judgement:
    """What a judge says of one item.

    Attributes:
        score: Mean of `scores`, or what the judge's `pool` and `recalibration` make of them, rubric units; NaN if there
            is none, never a guess.
        scores: One for each rationale that reached its score.
        rationales: The rationales behind `scores`.
        probs: Probabilities of the grid's scores under the whole vocabulary, `(S, K)`, as the model gave them.
        grid_mass: Mean probability on the grid; far below 1 means that the model did not expect a score there.
        std: Mean standard deviation of the score under the model, renormalised on the grid, rubric units.
        error: Why there is no score, or None.
        pruned_mass: Where scores are several tokens: mean probability of beginnings that were too improbable to be
            followed. 0 for a grid of single tokens.
        error_bound: How far that may have moved a `mean` score, rubric units; for other decisions see `pruned_mass`.
    """

    score: float = math.nan
    scores: list[float] = field(default_factory=list)
    rationales: list[str] = field(default_factory=list)
    probs: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    grid_mass: float = math.nan
    std: float = math.nan
    error: str | None = None
    pruned_mass: float = 0.0
    error_bound: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; NaN becomes None."""
        return {
            "score": None if math.isnan(self.score) else self.score,
            "scores": self.scores,
            "rationales": self.rationales,
            "probs": self.probs.tolist(),
            "grid_mass": None if math.isnan(self.grid_mass) else self.grid_mass,
            "std": None if math.isnan(self.std) else self.std,
            "error": self.error,
            "pruned_mass": self.pruned_mass,
            "error_bound": self.error_bound,
        }


class CoTRAILJudge:
    """Score responses: sample rationales up to the marker, then take the expected score behind each.

    Args:
        backend: The judge model.
        score_values: The score grid, in rubric units; or texts with their values, such as `{"poor": 1, "good": 2}`.
        score_marker: Text at which a rationale ends.
        completion_format: How rationale, marker and score are joined; one space each by default.
        num_generations: Rationales for each item; their scores are averaged.
        decision: How probabilities become a score: `mean`, `median`, `mode` or `sampled`.
        normalize_grid: Divide the expected score by the mass on the grid.
        score_temperature: Sharpens (below 1) or flattens score probabilities before `decision`: see `scores.temper`.
        pool: How several rationales become one score: the mean of their `scores`, or `decision` applied to the mean of
            their `distributions`. For the expected score without `normalize_grid` the two are one.
        recalibration: A map that was fitted on held-out judgements, applied to the final score; None: none.
        temperature: Of sampling the rationale.
        top_p: Of sampling the rationale.
        repetition_penalty: Of sampling the rationale.
        max_new_tokens: Tokens a rationale may have.
        seed: Of sampling.
        max_attempts: How often a rationale is sampled until it reaches the marker.
        append_marker: Score a rationale that never reached the marker as if it had. For models that were not trained
            to write it, such as a seed model; otherwise such an item is an error.
        writes_rationale: False for a judge that gives its score straight after the prompt; nothing is generated then.

    Raises:
        ValueError: An unknown decision or pool, a score temperature that is not above 0, or a grid that the tokenizer
            cannot tell apart.

    Source: Chiang et al. 2025, CoT-RAIL, https://aclanthology.org/2025.acl-long.147
    """

    def __init__(
        self,
        backend: Backend,
        *,
        score_values: Sequence[float] | Mapping[str, float] = (1, 2, 3, 4, 5),
        score_marker: str = "[RESULT]",
        completion_format: CompletionFormat | None = None,
        num_generations: int = 1,
        decision: Decision = "mean",
        normalize_grid: bool = False,
        score_temperature: float = 1.0,
        pool: Pool = "scores",
        recalibration: Recalibration | None = None,
        temperature: float = 1.0,
        top_p: float = 0.9,
        repetition_penalty: float = 1.03,
        max_new_tokens: int = 1024,
        seed: int = 42,
        max_attempts: int = 3,
        append_marker: bool = False,
        writes_rationale: bool = True,
    ) -> None:
        if decision not in DECISIONS:
            raise ValueError(f"decision={decision!r} is unknown: choose one of {', '.join(DECISIONS)}")
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r} is unknown: choose one of {', '.join(POOLS)}")
        for name, count in (("num_generations", num_generations), ("max_attempts", max_attempts)):
            if count < 1:
                raise ValueError(f"{name}={count} must be 1 or more")
        temper(torch.ones(1), score_temperature)  # an unusable temperature is refused before anything is generated
        self.backend = backend
        self.grid = ScoreGrid.from_values(score_values)
        self.format = completion_format or CompletionFormat(score_marker)
        self.num_generations = num_generations
        self.decision: Decision = decision
        self.normalize_grid = normalize_grid
        self.score_temperature = score_temperature
        self.pool: Pool = pool
        self.recalibration = recalibration
        self.sampling = {
            "temperature": temperature,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "max_new_tokens": max_new_tokens,
        }
        self.seed = seed
        self.max_attempts = max_attempts
        self.append_marker = append_marker
        self.writes_rationale = writes_rationale
        self._grid_checked: set[tuple[int, bool]] = set()  # tokenizers and types of prompt

    @classmethod
    def from_pretrained(
        cls, path: str | Path, backend: Backend | str = "transformers", *, recalibrate: bool = False, **settings: Any
    ) -> "CoTRAILJudge":
        """Load a judge that TRACTTrainer saved, with the grid and the format that it was trained with.

        Args:
            path: Model or adapter directory, or hub id, with a `tract_config.json`.
            backend: A backend, or `transformers`.
            recalibrate: Apply the recalibration that was saved there: see `recalibration.Recalibration`.
            **settings: Other arguments of the class.

        Raises:
            FileNotFoundError: No `tract_config.json` there; or, with `recalibrate`, no `tract_calibration.json`.
        """
        config = JudgeConfig.load(path)
        config.check_single_score(path)
        if recalibrate:
            settings["recalibration"] = Recalibration.load(path)
        if isinstance(backend, str):
            if backend != "transformers":
                raise ValueError(
                    f"backend={backend!r} is unknown: give 'transformers', or a backend, such as VLLMBackend(path)"
                )
            backend = TransformersBackend(str(path))
        judge = cls(
            backend,
            score_values=dict(zip(config.grid.texts, config.grid.values, strict=True)),
            completion_format=config.format,
            **{
                "normalize_grid": config.normalize_grid,
                "writes_rationale": config.writes_rationale,
                **settings,
            },
        )
        judge.grid = config.grid
        return judge

    def judge(
        self, rows: Sequence[Mapping[str, Any] | str], *, first: int = 0, on_progress: Any = None
    ) -> list[Judgement]:
        """Score items, in order. What goes wrong with one item is that item's `error`.

        Args:
            rows: A prompt each, or rows with a `prompt`, written like the training rows.
            first: Number of the first item where `rows` is a part of more; the random seed depends on it.
            on_progress: Called with the number of items whose rationales have just been written.
        """
        if isinstance(rows, str | Mapping):
            raise TypeError(f"rows is one {type(rows).__name__}: put it into a list, as in judge.judge([row])[0]")
        prompts: list[Prompt] = [_prompt_of(row) for row in rows]
        judgements = [Judgement() for _ in prompts]
        ids: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            try:
                _check_prompt(rows[i], prompt)
                ids[i] = prompt_ids(self.backend.tokenizer, prompt)
            except (TypeError, ValueError, KeyError) as error:
                judgements[i].error = f"the prompt cannot be read: {error}"
        if not ids:
            return judgements
        self._check_grid(prompts[next(iter(ids))])
        samples = self._rationales(ids, first, on_progress)
        slots: list[tuple[int, str]] = []
        for i, generations in samples.items():
            usable = [generation for generation in generations if self._usable(generation)]
            slots += [(i, generation.text.rstrip()) for generation in usable]
            if not usable:
                judgements[i].error = self._reason(generations)
        found = self.grid_probabilities([prompts[i] for i, _ in slots], [rationale for _, rationale in slots])
        probs = found.probs
        grouped: dict[int, list[int]] = {}
        for slot, (i, _) in enumerate(slots):
            if np.isnan(probs[slot]).any():
                judgements[i].error = "prompt and rationale leave no room in the model's context window"
            else:
                grouped.setdefault(i, []).append(slot)
        for i, mine in grouped.items():
            judgements[i].error = None
            self._fill(judgements[i], probs[mine], [slots[slot][1] for slot in mine], first + i)
            judgements[i].pruned_mass = float(found.pruned_mass[mine].mean())
            judgements[i].error_bound = float(self._error_bounds(found)[mine].mean())
        return judgements

    def score_rationales(self, prompts: Sequence[Prompt], rationales: Sequence[str]) -> NDArray[np.float64]:
        """Probabilities of the grid's scores behind given rationales, `(len(prompts), K)`."""
        return self.grid_probabilities(prompts, rationales).probs

    def grid_probabilities(self, prompts: Sequence[Prompt], rationales: Sequence[str]) -> GridProbabilities:
        """Like `score_rationales`, with what was left out of them: one batched pass, or, where a backend
        asks for scores of several tokens token by token, one a level of their trie.

        Args:
            prompts: Written like the training rows' prompts.
            rationales: One for each prompt, without the marker.
        """
        if not prompts:
            return GridProbabilities.exact(np.zeros((0, len(self.grid))))
        self._check_grid(prompts[0])
        prefixes = [
            score_prefix_ids(self.backend.tokenizer, prompt, rationale, self.format, self.grid)
            for prompt, rationale in zip(prompts, rationales, strict=True)
        ]
        if self.grid.paths:
            # A backend may know how to ask for whole scores at once; every one can be asked token by token.
            ask_at_once = getattr(self.backend, "trie_logprobs", None)
            logprobs = None if ask_at_once is None else ask_at_once(prefixes, self.grid.trie)
            if logprobs is not None:
                return GridProbabilities.exact(np.exp(logprobs))
            return walk_trie(self.grid.trie, prefixes, self.backend.next_token_logprobs, self.grid.values)
        return GridProbabilities.exact(np.exp(self.backend.next_token_logprobs(prefixes, self.grid.token_ids)))

    def _error_bounds(self, found: GridProbabilities) -> NDArray[np.float64]:
        """How far what was not followed can have moved each expected score, rubric units."""
        if not self.normalize_grid:
            return found.error_bound
        # A mean over the mass m that was found moves by at most the range once mass p joins it: p / (m + p) of it.
        low, high = self.grid.values[0], self.grid.values[-1]
        mass = np.maximum(found.probs.sum(axis=1) + found.pruned_mass, np.finfo(float).tiny)
        bounds: NDArray[np.float64] = found.pruned_mass / mass * (high - low)
        return bounds

    def _check_grid(self, prompt: Prompt) -> None:
        """Look the grid's tokens up where scores will stand, and compare with those of the training; once a kind."""
        kind = (id(self.backend.tokenizer), isinstance(prompt, str))
        if kind in self._grid_checked:
            return
        row = with_completion(prompt, self.format.join("", self.grid.texts[0]))
        resolved, _ = resolve_grid(self.backend.tokenizer, row, self.format.marker, self.grid)
        trained = self.grid.token_ids or [path.written for path in self.grid.paths]
        if trained and not resolved.same_tokens(self.grid):
            here = resolved.token_ids or [path.written for path in resolved.paths]
            raise ValueError(
                f"the scores are the tokens {here} here, but were {trained} in training: "
                "this is not the tokenizer that the judge was trained with"
            )
        if not trained:
            self.grid = resolved
        self._grid_checked.add(kind)

    def _rationales(
        self, ids: Mapping[int, Sequence[int]], first_item: int, on_progress: Any
    ) -> dict[int, list[Generation]]:
        """Sample each item's rationales, and again those that did not reach the marker."""
        if not self.writes_rationale:
            if on_progress is not None:
                on_progress(len(ids))
            return {i: [Generation("", "stop", 0)] for i in ids}
        results: dict[int, list[Generation]] = {}
        open_slots = [(i, sample) for i in ids for sample in range(self.num_generations)]
        for attempt in range(1, self.max_attempts + 1):
            settings: dict[str, Any] = {**self.sampling, "stop": self.format.marker}
            settings["seed"] = int(digest([self.seed, first_item, attempt])[:8], 16)
            if attempt == 1:
                first = self.backend.generate(
                    list(ids.values()), n=self.num_generations, on_progress=on_progress, **settings
                )
                results = {i: list(generations) for i, generations in zip(ids, first, strict=True)}
            else:
                again = self.backend.generate([ids[i] for i, _ in open_slots], n=1, **settings)
                for (i, sample), generations in zip(open_slots, again, strict=True):
                    results[i][sample] = generations[0]
            open_slots = [
                (i, sample) for i, sample in open_slots if results[i][sample].finish_reason in ("eos", "length")
            ]
            if not open_slots or self.append_marker:
                break
        return results

    def _usable(self, generation: Generation) -> bool:
        return generation.finish_reason == "stop" or (
            self.append_marker and generation.finish_reason != "prompt_too_long"
        )

    def _reason(self, generations: Sequence[Generation]) -> str:
        last = generations[-1]
        if last.finish_reason == "prompt_too_long":
            return "the prompt leaves no room in the model's context window"
        ending = (
            f"max_new_tokens={self.sampling['max_new_tokens']} ran out"
            if last.finish_reason == "length"
            else "the model ended its turn"
        )
        return f"no rationale reached {self.format.marker!r} in {self.max_attempts} attempts: {ending}"

    def _fill(self, judgement: Judgement, probs: NDArray[np.float64], rationales: list[str], item: int) -> None:
        tensor, values = torch.from_numpy(probs), torch.tensor(self.grid.values, dtype=torch.float64)
        generator = torch.Generator().manual_seed(int(digest([self.seed, "score", item])[:8], 16))
        tensor = temper(tensor, self.score_temperature)
        rule: dict[str, Any] = {"normalize": self.normalize_grid, "generator": generator}
        judgement.scores = decide(tensor, values, self.decision, **rule).tolist()
        judgement.score = float(np.mean(judgement.scores))
        if self.pool == "distributions":
            judgement.score = float(decide(tensor.mean(dim=0, keepdim=True), values, self.decision, **rule))
        if self.recalibration is not None:
            judgement.score = float(self.recalibration(judgement.score))
        judgement.rationales = rationales
        judgement.probs = probs
        judgement.grid_mass = float(probs.sum(axis=1).mean())
        on_grid = probs / probs.sum(axis=1, keepdims=True)
        mean = on_grid @ np.array(self.grid.values)
        variance = on_grid @ np.square(self.grid.values) - np.square(mean)
        judgement.std = float(np.sqrt(np.clip(variance, 0, None)).mean())


def _prompt_of(row: Any) -> Any:
    return row["prompt"] if isinstance(row, Mapping) and "prompt" in row else row


def _check_prompt(row: Any, prompt: Any) -> None:
    """Refuse what is neither text nor chat messages, and say what it is."""
    if isinstance(prompt, str):
        return
    if isinstance(row, Mapping) and "prompt" not in row:
        raise ValueError(f"the row has no `prompt`; its columns are {', '.join(sorted(map(str, row)))}")
    if not isinstance(prompt, Sequence):
        raise TypeError(f"it is {type(prompt).__name__}, not text or a list of chat messages")
    for message in prompt:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a chat message needs `role` and `content`, and one is {message!r}")
