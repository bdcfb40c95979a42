"""What training would make of rows, before anything is trained: lengths, scores, refusals. Loads a tokenizer, no model.

Every refusal is that of the door or of the encoder; none is decided here.
"""

import itertools
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from trl_tract.backends.loading import tokenizer_to_train
from trl_tract.backends.tree import distinct_share, placed
from trl_tract.commands.template_view import template_words
from trl_tract.commands.token_view import around_score, shown_prompt, view_row
from trl_tract.evaluation.tables import aligned
from trl_tract.rows.dataset import find_scales
from trl_tract.rows.encoding import RowEncoder
from trl_tract.rows.golds import is_missing, read_golds
from trl_tract.rows.refusals import Refusal, refusal_summary
from trl_tract.rows.rendering import as_prompt_completion, asks_in_chat, settled
from trl_tract.rows.row import Row
from trl_tract.rows.template import Template, TemplateSettings
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale, read_scales
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.door import Bare, Source, group_of, written_rows
from trl_tract.sources.prompts import ORDERS
from trl_tract.sources.schemas import Item
from trl_tract.text.display import visible
from trl_tract.text.terminal import bars

_EXAMPLES = 5  # rows that are kept to be shown
_LOOKED_AT = 1000  # records whose common tokens are counted
_BATCH = 8  # rows in a micro-batch, as the host has them by default


@dataclass
class Agreement:
    """Gold scores of a column, and the scores that the same rows' completions have; rubric units."""

    golds: "array[float]" = field(default_factory=lambda: array("d"))
    written: "array[float]" = field(default_factory=lambda: array("d"))

    def __str__(self) -> str:
        nearest, difference, correlation = self._measures()
        return (
            f"{len(self.golds):,} completions also contain a score. Mean difference from the gold score: "
            f"{difference:.2f}; correlation: {correlation:.2f}; less than one apart: {nearest:,}"
        )

    def contradiction(self, grid: ScoreGrid) -> str | None:
        """What is to be said where the two cannot both be right; None where they may be."""
        if len(self.golds) < 5:
            return None
        _, difference, correlation = self._measures()
        if correlation >= 0 and difference <= (grid.values[-1] - grid.values[0]) / 4:
            return None
        kind = "are negatively correlated" if correlation < 0 else f"differ by {difference:.2f} on average"
        return (
            f"the gold scores and the scores in the completions {kind}. Check whether the score column is reversed, "
            "uses another scale or belongs to other rows. As it is, the rationale would argue for one score, and the "
            "squared error would train another"
        )

    def _measures(self) -> tuple[int, float, float]:
        golds, written = np.array(self.golds), np.array(self.written)
        gaps = np.abs(golds - written)
        vary = len(golds) > 1 and golds.std() > 0 and written.std() > 0
        return int((gaps < 1).sum()), float(gaps.mean()), float(np.corrcoef(golds, written)[0, 1]) if vary else math.nan


@dataclass
class RowsReport:
    """Statistics of the rows in one source.

    Attributes:
        judged_only: Records with a gold score but without a completion: they can be judged, not trained on.
        bare: Records without a completion, examined with their gold score in its place.
        golds: Gold scores of the training rows by aspect, in rubric units. The aspect's name is empty for rows with one
            score.
        rated: By aspect, how many of these are the mean of several annotators.
        agreement: By aspect, gold scores from a column compared with the scores in the completions.
        longest: Tokens of the longest row, before any cut: the smallest `max_length` that cuts no row.
        groups_of_rows: Of all rows, those that are refused for their tokens among them.
        places: Of the rows that are trained on, among all these.
        sequences: Token ids and positions of the rows of the first 1,000 records, `(n, 2)` each.
    """

    name: str
    records: int = 0
    trained: int = 0
    judged_only: int = 0
    bare: int = 0
    groups: int = 0
    prompt_tokens: "array[int]" = field(default_factory=lambda: array("l"))
    completion_tokens: "array[int]" = field(default_factory=lambda: array("l"))
    tokens: "array[int]" = field(default_factory=lambda: array("l"))
    golds: dict[str, "array[float]"] = field(default_factory=dict)
    rated: Counter[str] = field(default_factory=Counter)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    groups_of_rows: list[bytes] = field(default_factory=list)
    places: "array[int]" = field(default_factory=lambda: array("l"))
    longest: int = 0
    examples: list[tuple[int, Row]] = field(default_factory=list)
    sequences: list[NDArray[np.int64]] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether there is something to train on, and nothing would be refused."""
        return bool(self.trained) and not self.refused

    def add_tokens(self, number: int, columns: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
        """Count the tokens of a row that is trained on; `whole` is what it is where nothing is cut."""
        ids, length = columns["input_ids"], whole["num_tokens"]
        prompt = next((i for i, label in enumerate(whole["labels"]) if label != -100), length)
        self.trained += 1
        self.tokens.append(len(ids))
        self.prompt_tokens.append(prompt)
        self.completion_tokens.append(length - prompt)
        if number < _LOOKED_AT:
            self.sequences.append(placed(ids))

    def add_golds(self, row: Row, golds: Sequence[float], scales: Sequence[Scale], converted: bool) -> bool:
        """Count a row's gold scores; whether its completion says no others, and was written from them."""
        for scale, gold, each in zip(scales, golds, read_golds(row, scales) or [], strict=True):
            self.golds.setdefault(scale.name, array("d")).append(gold)
            self.rated[scale.name] += len(each) > 1
        if is_missing(row.get("score")) and is_missing(row.get("scores")):
            return True
        made = converted
        written = read_golds({"completion": row["completion"]}, scales) or []
        for scale, gold, (score,) in zip(scales, golds, written, strict=True):
            agreement = self.agreement.setdefault(scale.name, Agreement())
            agreement.golds.append(gold)
            agreement.written.append(score)
            made = made and score == scale.grid.value_of(scale.grid.nearest_text(gold))
        return made


def examine(
    found: Iterable[tuple[int, Item | Refusal]],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    training: Mapping[str, Any],
    *,
    examples: Sequence[int] | None = None,
) -> tuple[RowsReport, RowEncoder | None]:
    """Tokenise all rows as training would, one at a time.

    Args:
        found: The records' numbers and items, or why there is none: see `door.Source.found`.
        training: Fields of TRACTConfig; those that are left out have its defaults.
        examples: Records whose rows are kept to be shown; None: the first five that are trained on.

    Returns:
        The report, and the encoder, which shows rows; None where no row has a score that can be found.
    """
    scales, max_length = read_scales(training), training.get("max_length", 3000)
    report = RowsReport(name)
    rows = _rows(found, report, bool(tokenizer.chat_template))
    first = list(itertools.islice(rows, 1000))
    if not first:
        return report, None
    settings = settled(tokenizer, TemplateSettings.of_training(training), (row for _, row, _ in first))
    encoder = RowEncoder(
        find_scales(Template(tokenizer, settings), (row for _, row, _ in first), scales),
        max_length,
        tokenizer=tokenizer,
        settings=settings,
        completion_only=training.get("completion_only_loss") is not False,
        score_in_ce=bool(training.get("score_in_ce")),
        drop_rationale=bool(training.get("drop_rationale")),
    )
    uncut = replace(encoder, max_length=None, completion_only=True)  # the labels tell where the prompt ends
    shown: set[int] = set()
    made = True  # all scores in the completions were written from the gold scores
    for place, (number, row, converted) in enumerate(itertools.chain(first, rows)):
        report.groups_of_rows.append(group_of(row))
        columns = whole = uncut(row)
        report.longest = max(report.longest, whole["num_tokens"])
        if not whole["refusal_kind"] and max_length is not None and whole["num_tokens"] > max_length:
            columns = encoder(row)  # which of them lose their score is the encoder's to say
        if columns["refusal_kind"]:
            report.refused.append(Refusal(number, columns["refusal_kind"], columns["refusal"], columns["num_tokens"]))
            continue
        report.add_tokens(number, columns, whole)
        report.places.append(place)
        golds = [score for score in whole["score_labels"] if not np.isnan(score)]
        made = report.add_golds(row, golds, scales, converted) and made
        if number in shown:
            continue  # of a record with several rationales, the first
        if len(report.examples) < _EXAMPLES if examples is None else number in examples:
            shown.add(number)
            report.examples.append((number, row))
    if made:
        report.agreement.clear()
    report.refused.sort(key=lambda refusal: refusal.number)
    return report, encoder


def _rows(
    found: Iterable[tuple[int, Item | Refusal]], report: RowsReport, chat: bool
) -> Iterator[tuple[int, Row, bool]]:
    """The training rows, each with its record's number and whether we wrote its completion; the rest is counted."""
    groups: set[int] = set()
    for number, item in found:
        report.records += 1
        if isinstance(item, Refusal):
            report.refused.append(item)
            continue
        report.judged_only += not item.training
        report.bare += item.bare
        groups.update([hash(item.group)] if item.training else [])
        report.groups = len(groups)
        yield from ((number, row, item.converted or item.bare) for row in written_rows(item, item.training, chat))


def lengths_table(report: RowsReport) -> list[str]:
    """Tokens of prompts, completions and whole rows: least, median, 95th percentile, most."""
    table = [["tokens", "min", "median", "p95", "max"]]
    for name, lengths in (
        ("prompt", report.prompt_tokens),
        ("completion", report.completion_tokens),
        ("both", report.tokens),
    ):
        # Lengths that rows really have, not means of two.
        cuts = np.percentile(lengths, [0, 50, 95, 100], method="inverted_cdf")
        table.append([name, *(f"{int(cut):,}" for cut in cuts)])
    return aligned(table).splitlines()


def score_histogram(golds: Sequence[float], grid: ScoreGrid, *, mark: str = "█") -> list[str]:
    """How often each score of the grid is the one nearest to a gold score."""
    counts = Counter(map(grid.nearest_text, golds))
    shown = grid.texts if len(grid) <= 21 else sorted(counts, key=grid.texts.index)
    return bars({text: counts.get(text, 0) for text in shown}, mark=mark)


def what_is_refused(report: RowsReport, training: Mapping[str, Any]) -> str:
    """One sentence for each reason, with the first row and, unless such rows are to be dropped, what to do."""
    total, max_length = report.trained + len(report.refused), training.get("max_length", 3000)
    fix = training.get("invalid_rows") != "drop"
    return visible(refusal_summary(report.refused, total, report.name, max_length, fix=fix))


def check(
    source: str,
    model: str,
    training: Mapping[str, Any],
    *,
    own: OwnColumns | None = None,
    rows: Sequence[int] = (0,),
    mark: str = "█",
    say: Callable[[str], None] = print,
) -> bool:
    """Print what training would make of a source; whether it would take all of it.

    Raises:
        FileNotFoundError, ValueError: The source as a whole cannot be read.
    """
    tokenizer = tokenizer_to_train(model, training.get("chat_template_path"))
    scales, max_length = read_scales(training), training.get("max_length", 3000)
    bare: Bare = "all" if training.get("drop_rationale") else "lacking"
    found = Source(source, scales, own, bare=bare, writes=bare == "lacking").found()
    report, encoder = examine(found, Path(source).name, tokenizer, training, examples=rows)
    say(_counts(report))
    if encoder is not None and report.trained:
        say("\n" + "\n".join(lengths_table(report)))
        for scale in scales:
            golds = report.golds[scale.name]
            fractions, rated = sum(gold not in scale.grid.values for gold in golds), report.rated[scale.name]
            between = f", {fractions:,} of them between two grid scores" if fractions else ""
            means = f"; {rated:,} are the mean of several annotators" if rated else ""
            say(f"\n{len(golds):,} gold scores{f' of {scale.name}' if scale.name else ''}{between}{means}")
            say("\n".join(score_histogram(golds, scale.grid, mark=mark)))
            if scale.name in report.agreement:
                say(str(report.agreement[scale.name]))
        if (chat := next((row for _, row in report.examples if asks_in_chat([row])), None)) is not None:
            say("\n" + "\n".join(template_words(encoder.template, as_prompt_completion(chat))))
        for number, row in report.examples:
            tokens = view_row(encoder, row)
            say(f"\nrow {number}, the prompt as the model reads it\n{shown_prompt(tokens)}")
            say(f"\nrow {number}, the tokens around the {'first ' if scales[0].name else ''}marker")
            say(around_score(tokens))
        for number in sorted(set(rows) - {number for number, _ in report.examples}):
            say(f"\nrow {number} is not shown: it does not exist or would not be used for training")
        say(f"\n{_max_length(report, max_length)}")
        say(_shared(report, source, scales, own, tokenizer, training))
    elif not report.refused:
        say("\nNothing to train on: no row has both a prompt and a score")
    if report.refused:
        say(f"\nRefused: {what_is_refused(report, training)}")
        say("Training would stop here. With --invalid_rows drop, it continues without these rows")
    elif report.trained:
        say("\nNo row would be refused")
    if bare == "lacking" and report.bare:
        say(
            f"{report.bare:,} rows have no rationale. `trl-tract run` writes rationales (--rationales auto) or trains "
            "without them (--rationales none). The lengths above do not include rationales that are still to be "
            "written"
        )
    for line in contradictions(report, scales):
        say(line)
    return report.usable


def contradictions(report: RowsReport, scales: Sequence[Scale]) -> list[str]:
    """A warning for each scale whose gold scores and written scores cannot both be right."""
    found = {
        scale: report.agreement[scale.name].contradiction(scale.grid)
        for scale in scales
        if scale.name in report.agreement
    }
    return [f"Warning: {scale.about}{problem}" for scale, problem in found.items() if problem]


def _counts(report: RowsReport) -> str:
    total = report.trained + len(report.refused)
    usable = (
        (f"{report.trained:,} of {total:,} rows can be used for training") if total else "none can be used for training"
    )
    lines = [f"{report.name}: {report.records:,} records, {usable}"]
    if report.groups:
        lines.append(f"{report.groups:,} groups (a group is never split between training and evaluation)")
    if report.judged_only:
        lines.append(
            f"{report.judged_only:,} records have a score but no completion: they can be judged but not used "
            "for training"
        )
    return "\n".join(lines)


def _max_length(report: RowsReport, max_length: int | None) -> str:
    if max_length is not None and report.longest > max_length:
        return f"max_length: set it to {report.longest} or more; {max_length} would cut the longest row"
    return f"max_length: {report.longest} is enough for every row"


def _shared(
    report: RowsReport,
    source: str,
    scales: tuple[Scale, ...],
    own: OwnColumns | None,
    tokenizer: PreTrainedTokenizerBase,
    training: Mapping[str, Any],
) -> str:
    """Which part of the tokens share_prompts would compute, as prompts are and in the rubric's other order."""
    if not report.sequences:
        return (
            f"share_prompts: not estimated, because none of the first {_LOOKED_AT:,} records can be used for training"
        )
    share = distinct_share(report.sequences, _BATCH)
    told = f"share_prompts: computes {share:.0%} of the tokens, in micro-batches of {_BATCH} rows with a common prefix"
    if own is None or own.rubric is None or own.rubric.template is not None:
        return told
    (order,) = ORDERS.keys() - {own.rubric.order}
    other = Source(source, scales, replace(own, rubric=replace(own.rubric, order=order)))
    first = itertools.islice(other.found(), _LOOKED_AT)
    changed, _ = examine(first, report.name, tokenizer, training, examples=())
    if not changed.sequences:
        return told
    share = distinct_share(changed.sequences, _BATCH)
    return f"{told} (order: {own.rubric.order}), and {share:.0%} with `order: {order}` in the rubric"
