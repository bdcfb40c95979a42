"""CoTRAILJudge: sample a rationale, then report the expected score (CoT-RAIL). Knows nothing of training."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_tract.backends import Backend, Sampling, TransformersBackend
from trl_tract.backends.grid_scores import grid_probabilities
from trl_tract.evaluation.recalibration import Recalibration, applied_by_default
from trl_tract.judge.items import check_rows, read_item
from trl_tract.judge.judgement import Judgement
from trl_tract.judge.loop import Loop
from trl_tract.judge.scoring import Rule, Sampler
from trl_tract.rows.row import REFUSED, Prompt, Row
from trl_tract.rows.template import Asked, Template, TemplateSettings, Thinking
from trl_tract.rows.tokens import prefix_ids, resolve_asked
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.decisions import Decision, Pool
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import given_scales
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError, some_scores
from trl_tract.scale.trie import GridProbabilities
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.rubric import Rubric
from trl_tract.sources.schemas import as_text
from trl_tract.text.progress import progress

__all__ = ["CoTRAILJudge", "Judgement"]


class CoTRAILJudge:
    """Score responses: sample rationales up to the marker, then compute the expected score after each.

    Args:
        backend: The judge model.
        score_values: Score grid in rubric units, or a mapping from texts to values, such as `{"poor": 1, "good": 2}`.
        score_marker: Text that ends a rationale and precedes the score.
        completion_format: How rationale, marker and score are joined. None: with one space each.
        aspects: Aspects for completions with several scores, see `TRACTConfig.aspects`; replaces the three above. Each
            rationale follows the score of the previous aspect.
        num_generations: Number of rationales per item. Their scores are averaged.
        decision: How to turn the score probabilities into a score: `mean`, `median`, `mode`, `sampled` or `quantile`.
        quantile: Quantile for `decision="quantile"`; see `scores.decide`.
        normalize_grid: Divide the expected score by the probability mass on the grid.
        score_temperature: Sharpen (below 1) or flatten (above 1) the score probabilities before `decision`; see
            `scores.temper`.
        pool: How to combine several rationales: the mean of their `scores`, or `decision` applied to the mean of their
            `distributions`. Both are the same for the expected score without `normalize_grid`.
        recalibration: A correction fitted on held-out judgements and applied to the final score; with aspects, a
            mapping from names to corrections. None: no correction.
        temperature: Sampling temperature for rationales; 0 decodes greedily.
        top_p: Nucleus sampling threshold for rationales.
        repetition_penalty: Penalty on tokens that already occur in the prompt or the rationale; 1 turns it off.
        max_new_tokens: Maximum number of tokens in a rationale.
        seed: Random seed for rationales and sampled scores. Each item has its own random numbers, derived from its
            prompt and this seed, so a judgement does not depend on the item's position or on other items.
        max_attempts: Maximum number of attempts to sample a rationale that reaches the marker and a score.
        append_marker: Append the marker to a rationale that never reached it, and score it. For models that were not
            trained to write the marker, such as a seed model. Otherwise such an item is an error.
        writes_rationale: False for a judge that scores directly after the prompt, without generating text.
        chat_template_kwargs: Variables for the chat template. A row's own take precedence.
        thinking: `off`, or `rationale` for a judge whose rationale is its thinking: see `TRACTConfig.thinking`.
        template_date: Date for chat templates that render one, YYYY-MM-DD. None: today.

    Attributes:
        scales: The scales of a completion, in order. The name of a single scale is empty.
        template_settings: Settings of the chat template.
        chat: Whether the judge was trained on chat messages; None if unknown.
        rubric: Builds the prompts for `judge_response`: the training rubric, if one was saved with the judge.

    Raises:
        ValueError: An unknown decision or pool, a setting out of range, a grid that the tokenizer cannot tell apart, a
            recalibration of another scale.

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
        recalibration: Recalibration | Mapping[str, Recalibration] | None = None,
        temperature: float = 1.0,
        top_p: float = 0.9,
        repetition_penalty: float = 1.03,
        max_new_tokens: int = 1024,
        seed: int = 42,
        max_attempts: int = 3,
        append_marker: bool = False,
        writes_rationale: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking: Thinking = "off",
        template_date: str | None = None,
    ) -> None:
        for name, count in (("num_generations", num_generations), ("max_attempts", max_attempts)):
            if count < 1:
                raise ValueError(f"{name}={count} must be 1 or more")
        self.backend = backend
        self.scales = given_scales(score_values, score_marker, completion_format, aspects)
        self.recalibration = recalibration
        self._recalibrations()  # of another scale: refused now
        self.normalize_grid = normalize_grid
        self.writes_rationale = writes_rationale
        self._rule = Rule(decision, quantile, normalize_grid, score_temperature, pool)
        self.seed = seed
        sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty)
        self._sampler = Sampler(backend, asdict(sampling), max_attempts, append_marker, writes_rationale)
        self._sampler.check(num_generations, self.scales[0].marker, inspect.signature(CoTRAILJudge).parameters)
        self._num_generations = num_generations
        self.template_settings = TemplateSettings(chat_template_kwargs or {}, thinking, template_date)
        self.chat: bool | None = None
        self._rubric: Rubric | None = None
        self._known_template: tuple[Any, Template] | None = None
        self._tokens_found: set[tuple[int, bool]] = set()  # tokenizers and types of prompt

    def __repr__(self) -> str:
        scores = "; ".join(f"{scale.name or 'scores'} {some_scores(scale.grid.texts)}" for scale in self.scales)
        return f"CoTRAILJudge({self.backend.model_id!r}, {scores}, {self._rule.decision} of {self._num_generations})"

    @property
    def grid(self) -> ScoreGrid:
        """The score grid; with several scales, the first one's."""
        return self.scales[0].grid

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        backend: Backend | str = "transformers",
        *,
        revision: str | None = None,
        recalibrate: bool | None = None,
        **settings: Any,
    ) -> "CoTRAILJudge":
        """Load a judge that TRACTTrainer saved, with the grid and format from its training.

        Args:
            path: Model or adapter directory, or hub id, with a `tract_config.json`.
            backend: A backend, or `transformers`.
            revision: Branch, tag or commit of a hub id. A `backend` that you pass has its own revision.
            recalibrate: Apply the `recalibration.Recalibration` saved at `path`. None: only if a run fitted it.
            **settings: Other arguments of the class.

        Raises:
            FileNotFoundError: No `tract_config.json` there; or, with `recalibrate`, no `tract_calibration.json`.
        """
        config = JudgeConfig.load(path, revision)
        if recalibrate is None and "recalibration" not in settings:
            recalibrate = applied_by_default(path, revision)
        if recalibrate:
            if settings.get("recalibration") is not None:
                raise ValueError("recalibrate=True would replace the given recalibration. Use only one of the two")
            settings["recalibration"] = {
                scale.name: Recalibration.load(path, revision, scale=scale.name) for scale in config.scales
            }
        if isinstance(backend, str):
            if backend != "transformers":
                one = "Pass 'transformers', or a backend object such as VLLMBackend(path)"
                raise ValueError(f"backend={backend!r} is not supported. {one}")
            backend = TransformersBackend(str(path), revision=revision)
        judge = cls.from_config(config, backend, **settings)
        saved = OwnColumns.load(path, revision)
        judge.rubric = None if saved is None else saved.rubric
        return judge

    @classmethod
    def from_config(cls, config: JudgeConfig, backend: Backend, **settings: Any) -> "CoTRAILJudge":
        """Create a judge from the configuration saved in training.

        Args:
            config: The training format, as in `tract_config.json`.
            backend: The judge model.
            **settings: Other arguments of the class.
        """
        trained = {"normalize_grid": config.normalize_grid, "writes_rationale": config.writes_rationale}
        judge = cls(backend, **{**trained, **config.with_settings(settings)})
        judge.scales, judge.chat = config.scales, config.chat
        return judge

    def judge_response(
        self,
        *,
        response: str | Sequence[str],
        instruction: str | Sequence[str] = "",
        reference: str | Sequence[str | None] | None = None,
    ) -> Judgement | list[Judgement]:
        """Score one or several responses with the rubric saved with the judge.

        Args:
            response: The response to judge: one text, or a list.
            instruction: The instruction that it answers: one for all, or a list with one for each response.
            reference: An answer that would get the highest score: one for all, or a list. None: no reference.

        Returns:
            One judgement for one text, a list for a list.

        Raises:
            TypeError: A response is not text.
            ValueError: There is no rubric, it has no place for the reference, or a list differs in length from
                `response`.

        Example:
            `judge.judge_response(instruction="Where is my order?", response="On its way.").score`
        """
        responses = [response] if isinstance(response, str) else list(response)
        if others := [(number, each) for number, each in enumerate(responses) if not isinstance(each, str)]:
            raise TypeError("response {} is {!r}, not text".format(*others[0]))
        fields: dict[str, list[Any]] = {}
        for name, given in (("instruction", instruction), ("reference", reference)):
            fields[name] = [given] * len(responses) if given is None or isinstance(given, str) else list(given)
            if len(fields[name]) != len(responses):
                raise ValueError(f"{len(fields[name])} {name}s for {len(responses)} responses. Pass one for each")
        each = zip(responses, fields["instruction"], fields["reference"], strict=True)
        judgements = self.judge([self.response_row(*texts) for texts in each])
        return judgements[0] if isinstance(response, str) else judgements

    @property
    def rubric(self) -> Rubric | None:
        """The rubric that responses are judged by: the one saved with the judge, or another that you set.

        One without an order is asked in that of the rubric before it, see `Rubric.asked_of`.
        """
        return self._rubric

    @rubric.setter
    def rubric(self, rubric: Rubric | None) -> None:
        if rubric is not None and len(self.scales) == 1:
            rubric.check(self.grid)
        self._rubric = None if rubric is None else rubric.asked_of(self._rubric)

    def response_row(self, response: str, instruction: str | None = "", reference: str | None = None) -> Row:
        """Build the row for `judge` from a response and the rubric.

        Raises:
            ValueError: There is no rubric, or it has no place for the reference.
        """
        if self.rubric is None:
            raise ValueError(
                "no rubric was saved with this judge. Build the prompts as in training and use judge(), or set "
                'judge.rubric = Rubric.load("rubric.yaml") (trl_tract.sources.rubric)'
            )
        if reference and not self.rubric.shows("reference"):
            raise ValueError("the rubric's template has no {reference}. Leave the reference out, or add it there")
        row: Row = {"prompt": self.rubric.prompt(instruction or "", response, reference, self.scales[0].marker)}
        return as_text(row, self.asks_chat)

    @property
    def asks_chat(self) -> bool:
        """Whether prompts are chat messages; if unknown from training, whether the tokenizer has a chat template."""
        return bool(self.backend.tokenizer.chat_template) if self.chat is None else self.chat

    def judge(
        self,
        rows: Sequence[Mapping[str, Any] | str],
        *,
        seed: int | Sequence[int] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Judgement]:
        """Score items, in order. If an item cannot be scored, its judgement has an `error`.

        Args:
            rows: Prompts, or rows with a `prompt`, written like the training rows.
            seed: Random seed instead of the judge's, or one for each item.
            on_progress: Called with the number of items finished since the last call. Rationales are written for all
                items before they are scored, so an item with a rationale counts as half. None: a progress bar in a
                terminal or notebook, otherwise a line every 30 seconds.
        """
        check_rows(rows)
        if on_progress is None:
            hidden = len(rows) < 2 or os.environ.get("RANK", "0") != "0"  # of several processes one speaks
            with progress(total=len(rows), desc="judging", unit="item", hidden=hidden, patient=True) as bar:
                return self.judge(rows, seed=seed, on_progress=bar.update)
        seed = self.seed if seed is None else seed
        seeds = [seed] * len(rows) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(rows):
            raise ValueError(f"{len(seeds)} seeds for {len(rows)} rows. Pass one for each row, or one for all")
        judged: dict[int, Judgement] = {}
        asked: dict[int, Asked] = {}
        for i, row in enumerate(rows):
            if isinstance(row, Mapping) and row.get(REFUSED):
                judged[i] = Judgement(error=str(row[REFUSED]))
                continue
            try:
                item = read_item(row, self.chat)
                prompt = self._template.ask(item)
            except (TypeError, ValueError, KeyError) as error:
                judged[i] = Judgement(error=f"the prompt cannot be read: {error}")
                continue
            try:
                self._find_tokens(item)
            except ScoreNotFoundError as error:
                judged[i] = Judgement(error=f"no score can follow the prompt: {error}")
                continue
            asked[i] = prompt
        if judged:
            on_progress(len(judged))
        if asked:
            recalibrations = self._recalibrations()
            loop = Loop(self._template, self.scales, self._sampler, self._rule, recalibrations, self._num_generations)
            judged |= loop.run(asked, dict(enumerate(seeds)), on_progress)
        return [judged[i] for i in range(len(rows))]

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the judge: its weights or adapter, tokenizer, `tract_config.json`, recalibration and a card.

        Nothing else in its directory is uploaded: no checkpoints, logs or training arguments. A judge whose model was
        passed in loaded is saved first.

        Args:
            repo_id: `user/name`; created if it does not exist.
            **options: `base_model`, hub id of an adapter's base model if it was trained on a local directory;
                `private`, True by default; `token`, `revision` (a branch) and `commit_message`.

        Returns:
            The repository's URL. `CoTRAILJudge.from_pretrained(repo_id)` loads it.

        Raises:
            ValueError: The repository exists and is public, but `private=False` was not given; the adapter's base is a
                local directory; or the weights are not in this process.
        """
        from trl_tract.saved.hub import push_judge

        if not (self.grid.token_ids or self.grid.paths):  # nothing was judged yet
            prompt = [{"role": "user", "content": "a"}] if self.backend.tokenizer.chat_template else ""
            self._find_tokens({"prompt": prompt})
        config = JudgeConfig(self.scales, self.normalize_grid, self.writes_rationale, self.template_settings, self.chat)
        return push_judge(self.backend, config, repo_id, recalibrations=self._recalibrations(), **options)

    def score_rationales(self, prompts: Sequence[Prompt], rationales: Sequence[str]) -> NDArray[np.float64]:
        """Probabilities of the grid's scores after given rationales, `(len(prompts), K)`."""
        return self.grid_probabilities(prompts, rationales).probs

    def grid_probabilities(self, prompts: Sequence[Prompt], rationales: Sequence[str]) -> GridProbabilities:
        """Like `score_rationales`, with the probability mass that was left out. Needs one batched pass, or one per trie
        level if a backend computes scores of several tokens token by token.

        Args:
            prompts: Written like the training rows' prompts.
            rationales: One for each prompt, without the marker.
        """
        if len(self.scales) > 1:
            raise ValueError(
                "this judge scores several aspects, so it is not clear which rationale belongs to which. Use judge()"
            )
        if not prompts:
            return GridProbabilities.exact(np.zeros((0, len(self.grid))))
        self._find_tokens({"prompt": prompts[0]})
        prefixes = [
            prefix_ids(self._template, prompt, self.scales, [], rationale)
            for prompt, rationale in zip(prompts, rationales, strict=True)
        ]
        return grid_probabilities(self.backend, self.grid, prefixes)

    def _recalibrations(self) -> Mapping[str, Recalibration]:
        """The recalibrations by the name of their scale."""
        given = self.recalibration or {}
        given = {"": given} if isinstance(given, Recalibration) else given
        names = [scale.name for scale in self.scales]
        if wrong := [name for name in given if name not in names]:
            fitting = f"a mapping with the aspects {', '.join(names)}" if names[0] else "one Recalibration"
            raise ValueError(f"recalibration is for {wrong[0] or 'one score'!r}: give {fitting}")
        return given

    @property
    def _template(self) -> Template:
        """The backend's chat template; what is found out about it is kept as long as it stays what it is."""
        tokenizer = self.backend.tokenizer
        if self._known_template is None or self._known_template[0] != (id(tokenizer), tokenizer.chat_template):
            template = Template(tokenizer, self.template_settings)
            self._known_template = ((id(tokenizer), tokenizer.chat_template), template)
        return self._known_template[1]

    def _find_tokens(self, row: Row) -> None:
        """Look the tokens up where scores will stand, and compare with those of the training; once a kind of prompt."""
        kind = (id(self.backend.tokenizer), isinstance(row["prompt"], str))
        if kind in self._tokens_found:
            return
        found = resolve_asked(self._template, row, self.scales)
        self.scales = tuple(
            replace(scale, grid=scale.grid.found_again(here.grid))
            for scale, here in zip(self.scales, found, strict=True)
        )
        self._tokens_found.add(kind)
