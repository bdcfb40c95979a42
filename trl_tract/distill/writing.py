"""One block of self-distillation: sample rationales until nothing is wrong with them. Knows nothing of files."""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_tract.backends import Backend, Generation, Sampling, Stop
from trl_tract.backends.base import reusing
from trl_tract.distill.failures import Failure, rationale_failure, stated_score
from trl_tract.files.journal import seed_of
from trl_tract.rows.frame import Frame
from trl_tract.rows.row import Row
from trl_tract.rows.template import Asked, Template
from trl_tract.rows.thinking import answered, may_end, own_thinking, read_rationale, scored_text, stop_rules
from trl_tract.rows.tokens import prefix_ids
from trl_tract.scale.scale import Scale, locate_scores, scored_within
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.text.progress import Passes


@dataclass
class Draft:
    """One stage-two row under way.

    Attributes:
        asked: Its prompt as the model is asked; None where the chat template refuses it.
        golds: The gold scores as they are written, one for each scale.
    """

    row: Row
    asked: Asked | None
    golds: Sequence[str]
    rationales: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def frame(self, number: int) -> Frame:
        """What stands around rationale `number`: thinking is written before the first one alone."""
        return Frame() if self.asked is None or number else self.asked.frame

    def lacks(self, number: int) -> bool:
        """Whether rationale `number` is still to be written, and can be."""
        final = self.failures[-1:] in (["prompt too long"], ["prompt refused"])  # the same at every attempt
        return len(self.rationales) == number and not final


@dataclass(frozen=True)
class Writer:
    """Writes rationales; the fields are arguments of `CoTSelfDistill`, and `scales` have tokens."""

    backend: Backend
    template: Template
    scales: tuple[Scale, ...]
    sampling: Sampling
    num_generations: int
    seed: int
    max_attempts: int
    allow_leaks: bool

    def write(self, drafts: Sequence[Draft], start: int, report: Callable[[int], None]) -> None:
        """Write the rationales of a block: for each scale one, behind the gold score of the scale before it.

        Args:
            start: The block's first row; the random numbers depend on it.
        """
        # Each further rationale goes on behind the one before it.
        with reusing(self.backend) if len(self.scales) > 1 else nullcontext():
            self._write(drafts, start, Passes(report, len(drafts) // self.num_generations, len(self.scales)))

    def _write(self, drafts: Sequence[Draft], start: int, passes: Passes) -> None:
        attempts = self.max_attempts if self.sampling.temperature > 0 else 1  # greedy text would come out the same
        for number, scale in enumerate(self.scales):
            prompts = {
                place: ids
                for place, draft in enumerate(drafts)
                if draft.lacks(number) and (ids := self._asked(draft)) is not None
            }
            stated = {place: None if self.allow_leaks else self._unstated(drafts[place], number) for place in prompts}
            for attempt in range(1, attempts + 1):
                places = [place for place in prompts if drafts[place].lacks(number)]
                if not places:
                    break
                seed = [self.seed, start, attempt, *([number] if number else [])]
                n = self.num_generations if attempt + number == 1 else 1
                asked = [prompts[place] for place in places[::n]]
                tell = passes.add if attempt == 1 else None
                frames = [drafts[place].frame(number) for place in places]
                stop = Stop.at(scale, **stop_rules(frames))
                for place, generation in zip(places, self._sample(asked, n, stop, seed, tell), strict=True):
                    self._take(drafts[place], number, generation, stated[place])
        passes.finish()

    def _asked(self, draft: Draft) -> list[int] | None:
        """Tokens that the next rationale is written behind; None where the template refuses them."""
        done = list(zip(draft.rationales, draft.golds, strict=False))
        if draft.asked is not None:
            try:
                return prefix_ids(self.template, draft.asked, self.scales, done)
            except ScoreNotFoundError:
                pass
        draft.failures.append("prompt refused")
        return None

    def _sample(
        self,
        asked: Sequence[Sequence[int]],
        n: int,
        stop: Stop,
        seed: Sequence[int],
        tell: Callable[[float], None] | None,
    ) -> list[Generation]:
        """`n` continuations of each prompt, one after the other.

        Their seed is of block, attempt and scale alone, so that a rerun repeats them.
        """
        on_progress = None if tell is None else lambda count: tell(count * n / self.num_generations)
        settings: dict[str, Any] = {**asdict(self.sampling), "seed": seed_of(*seed)}
        sampled = self.backend.generate(asked, n=n, stop=stop, on_progress=on_progress, **settings)
        return [generation for generations in sampled for generation in generations]

    def _take(self, draft: Draft, number: int, generation: Generation, stated: re.Pattern[str] | None) -> None:
        frame = draft.frame(number)
        text = read_rationale(frame, generation.text)
        failure = rationale_failure(text, generation.finish_reason, stated)
        if failure is None and scored_within(answered(frame, generation.text), self.scales) is not None:
            failure = "leak"  # it would be found there when the row is trained on
        thinks = frame.block is not None and not frame.closing and own_thinking(text, frame)[0] is not None
        if failure is None and (thinks or not may_end(frame, generation.text)):
            failure = "thinking"
        if failure is None:
            draft.rationales.append(text)
        else:
            draft.failures.append(failure)

    def _unstated(self, draft: Draft, number: int) -> re.Pattern[str] | None:
        """What finds a score of scale `number` written out; None if the annotated rationale states one itself.

        The model was taught to state it then.
        """
        stated = stated_score(self.scales[number].grid.texts)
        try:
            content = scored_text(draft.row.get("completion"))
            spans = locate_scores(content, self.scales)
        except ScoreNotFoundError:
            return stated
        annotated = content[spans[number - 1].end if number else 0 : spans[number].marker_start]
        return None if stated.search(annotated) else stated
