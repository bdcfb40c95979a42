"""CoTRAILJudge: sample a rationale, then report the expected score (CoT-RAIL). Knows nothing of training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_tract.backends import Backend, Generation, TransformersBackend
from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.judge.aspect_judge import judge_aspects
from trl_tract.judge.judgement import Judgement
from trl_tract.judge.scoring import NO_ROOM, Rule, Sampler, grid_probabilities
from trl_tract.rows.rendering import with_completion
from trl_tract.rows.row import Prompt
from trl_tract.rows.tokens import prompt_ids, resolve_aspects, resolve_grid, score_prefix_ids
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.decisions import Decision, Pool
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale, read_aspects
from trl_tract.scale.text import CompletionFormat
from trl_tract.scale.trie import GridProbabilities

__all__ = ["CoTRAILJudge", "Judgement"]


class CoTRAILJudge:
    """Score responses: sample rationales up to the marker, then take the expected score behind each.

    Args:
        backend: The judge model.
        score_values: The score grid, in rubric units; or texts with their values, such as `{"poor": 1, "good": 2}`.
        score_marker: Text at which a rationale ends.
        completion_format: How rationale, marker and score are joined; one space each by default.
        aspects: Where a completion has several scores: see `TRACTConfig.aspects`; grid and marker above are not looked
            at then. Each rationale is written behind the score that was decided before it.
        num_generations: Rationales for each item; their scores are averaged.
        decision: How probabilities become a score: `mean`, `median`, `mode`, `sampled` or `quantile`.
        quantile: Of `decision="quantile"`: see `scores.decide`.
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
        ValueError: An unknown decision or pool, a score temperature or quantile out of range, a grid that the tokenizer
            cannot tell apart, or an argument that is for one score beside `aspects`.

    Source: Chiang et al. 2025, CoT-RAIL, https://aclanthology.org/2025.acl-long.147
    """

    def __init__(
        self,
        backend: Backend,
        *,
        score_values: Sequence[float] | Mapping[str, float] | str = (1, 2, 3, 4, 5),
        score_marker: str = "[RESULT]",
        completion_format: CompletionFormat | None = None,
        aspects: Mapping[str, Mapping[str, Any]] | str | None = None,
        num_generations: int = 1,
        decision: Decision = "mean",
        quantile: float = 0.5,
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
        self.aspects = () if aspects is None else read_aspects(aspects)
        if self.aspects and (recalibration is not None or not writes_rationale):
            wrong = "writes_rationale=False" if recalibration is None else "recalibration"
            raise ValueError(f"{wrong} is for judges of one score: leave it out, or leave aspects out")
        Rule(decision, quantile, normalize_grid, score_temperature, pool, seed)  # unusable settings are refused now
        for name, count in (("num_generations", num_generations), ("max_attempts", max_attempts)):
            if count < 1:
                raise ValueError(f"{name}={count} must be 1 or more")
        self.backend = backend
        self.grid = ScoreGrid.from_values(score_values)
        self.format = completion_format or CompletionFormat(score_marker)
        self.num_generations = num_generations
        self.decision: Decision = decision
        self.quantile = quantile
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
        cls,
        path: str | Path,
        backend: Backend | str = "transformers",
        *,
        revision: str | None = None,
        recalibrate: bool = False,
        **settings: Any,
    ) -> "CoTRAILJudge":
        """Load a judge that TRACTTrainer saved, with the grid and the format that it was trained with.

        Args:
            path: Model or adapter directory, or hub id, with a `tract_config.json`.
            backend: A backend, or `transformers`.
            revision: Branch, tag or commit of a hub id; a `backend` of your own is loaded at its own.
            recalibrate: Apply the recalibration that was saved there: see `recalibration.Recalibration`.
            **settings: Other arguments of the class.

        Raises:
            FileNotFoundError: No `tract_config.json` there; or, with `recalibrate`, no `tract_calibration.json`.
        """
        config = JudgeConfig.load(path, revision)
        if recalibrate:
            settings["recalibration"] = Recalibration.load(path, revision)
        if isinstance(backend, str):
            if backend != "transformers":
                raise ValueError(
                    f"backend={backend!r} is unknown: give 'transformers', or a backend, such as VLLMBackend(path)"
                )
            backend = TransformersBackend(str(path), revision=revision)
        first, aspects = config.scales[0], config.scales if len(config.scales) > 1 else ()
        judge = cls(
            backend,
            score_values=dict(zip(first.grid.texts, first.grid.values, strict=True)),
            completion_format=config.format,
            aspects={aspect.name: aspect.to_dict() for aspect in aspects} or None,
            **{
                "normalize_grid": config.normalize_grid,
                "writes_rationale": config.writes_rationale,
                **settings,
            },
        )
        judge.grid, judge.aspects = first.grid, aspects
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
        if self.aspects:
            asked = {i: prompts[i] for i in ids}
            found_by_item = judge_aspects(
                asked,
                ids,
                self.aspects,
                sampler=self._sampler,
                rule=self._rule,
                num_generations=self.num_generations,
                first=first,
            )
            if on_progress is not None:
                on_progress(len(ids))
            return [found_by_item.get(i, judgement) for i, judgement in enumerate(judgements)]
        samples = self._rationales(ids, first, on_progress)
        slots: list[tuple[int, str]] = []
        for i, generations in samples.items():
            usable = [generation for generation in generations if self._sampler.usable(generation)]
            slots += [(i, generation.text.rstrip()) for generation in usable]
            if not usable:
                judgements[i].error = self._sampler.reason(generations[-1], self.format.marker)
        found = self.grid_probabilities([prompts[i] for i, _ in slots], [rationale for _, rationale in slots])
        grouped: dict[int, list[int]] = {}
        for slot, (i, _) in enumerate(slots):
            if np.isnan(found.probs[slot]).any():
                judgements[i].error = NO_ROOM
            else:
                grouped.setdefault(i, []).append(slot)
        for i, mine in grouped.items():
            rationales = [slots[slot][1] for slot in mine]
            self._rule.fill(judgements[i], self.grid, found.of(mine), rationales, [first + i], self.recalibration)
        return judgements

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the judge: its weights or adapter, tokenizer, `tract_config.json`, recalibration and a card.

        Nothing else of its directory goes with them: no checkpoints, logs or training arguments. A judge whose model
        came loaded is saved first.

        Args:
            repo_id: `user/name`; made if it does not exist.
            **options: `base_model`, hub id of an adapter's base where it was trained on a directory; `private`, True
                unless you say otherwise; `token`, `revision` (a branch) and `commit_message`.

        Returns:
            The repository's address. `CoTRAILJudge.from_pretrained(repo_id)` loads it.

        Raises:
            ValueError: The repository exists and is public, and `private=False` was not given; the adapter's base is a
                directory; or the weights are not in this process.
        """
        from trl_tract.saved.hub import push_judge

        first = self.aspects[0].grid if self.aspects else self.grid
        if not (first.token_ids or first.paths):  # nothing was judged yet
            self._check_grid([{"role": "user", "content": ""}] if self.backend.tokenizer.chat_template else "")
        scales = self.aspects or (Scale("", self.grid, self.format),)
        config = JudgeConfig(scales, self.normalize_grid, self.writes_rationale)
        return push_judge(self.backend, config, repo_id, recalibration=self.recalibration, **options)

    @property
    def _sampler(self) -> Sampler:
        return Sampler(self.backend, self.sampling, self.max_attempts, self.append_marker)

    @property
    def _rule(self) -> Rule:
        return Rule(self.decision, self.quantile, self.normalize_grid, self.score_temperature, self.pool, self.seed)

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
        if self.aspects:
            raise ValueError("this judge scores several aspects, and which rationale is whose is not said: use judge()")
        if not prompts:
            return GridProbabilities.exact(np.zeros((0, len(self.grid))))
        self._check_grid(prompts[0])
        prefixes = [
            score_prefix_ids(self.backend.tokenizer, prompt, rationale, self.format, self.grid)
            for prompt, rationale in zip(prompts, rationales, strict=True)
        ]
        return grid_probabilities(self.backend, self.grid, prefixes)

    def _check_grid(self, prompt: Prompt) -> None:
        """Look the grid's tokens up where scores will stand, and compare with those of the training; once a kind."""
        kind = (id(self.backend.tokenizer), isinstance(prompt, str))
        if kind in self._grid_checked:
            return
        if self.aspects:
            completion = "".join(aspect.format.join("", aspect.grid.texts[0]) for aspect in self.aspects)
            found = resolve_aspects(self.backend.tokenizer, with_completion(prompt, completion), self.aspects)
            grids = [_checked(aspect.grid, here.grid) for aspect, here in zip(self.aspects, found, strict=True)]
            self.aspects = tuple(replace(aspect, grid=grid) for aspect, grid in zip(self.aspects, grids, strict=True))
        else:
            row = with_completion(prompt, self.format.join("", self.grid.texts[0]))
            resolved, _ = resolve_grid(self.backend.tokenizer, row, self.format.marker, self.grid)
            self.grid = _checked(self.grid, resolved)
        self._grid_checked.add(kind)

    def _rationales(
        self, ids: Mapping[int, Sequence[int]], first_item: int, on_progress: Any
    ) -> dict[int, list[Generation]]:
        """Sample each item's rationales, and again those that did not reach the marker."""
        if not self.writes_rationale:
            if on_progress is not None:
                on_progress(len(ids))
            return {i: [Generation("", "stop", 0)] for i in ids}
        return self._sampler.sample(
            ids,
            stop=self.format.marker,
            n=self.num_generations,
            seed=lambda attempt: [self.seed, first_item, attempt],
            on_progress=on_progress,
        )


def _checked(known: ScoreGrid, here: ScoreGrid) -> ScoreGrid:
    """The grid with its tokens; those it was trained with, if it was, have to be those that it has here."""
    trained = known.token_ids or [path.written for path in known.paths]
    if not trained:
        return here
    if not here.same_tokens(known):
        found = here.token_ids or [path.written for path in here.paths]
        raise ValueError(
            f"the scores are the tokens {found} here, but were {trained} in training: "
            "this is not the tokenizer that the judge was trained with"
        )
    return known


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
