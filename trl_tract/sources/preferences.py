"""Pairs of responses of which one is better: the judge scores both, and ought to score the chosen one higher.

Two parts: pairs -> the rows that a judge is asked, and judgements -> the share of pairs that it gets right. Knows
nothing of files or models.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_tract.evaluation.intervals import Interval, intervals
from trl_tract.evaluation.pairs import Floats, numbered
from trl_tract.rows.messages import no_spelled_messages, text_of
from trl_tract.rows.row import Row
from trl_tract.sources.prompts import cleaned_instruction, prometheus_question
from trl_tract.sources.rubric import Rubric
from trl_tract.text.display import prompt_text

SIDES = ("chosen", "rejected")
_WHOLE = ("chosen_instruction", "rejected_instruction")


def is_pair(record: Mapping[str, Any]) -> bool:
    """Whether a record is a pair: `chosen` and `rejected`, or the whole prompts of the prometheus-eval JSON."""
    return set(SIDES) <= record.keys() or set(_WHOLE) <= record.keys()


def pair_rows(record: Mapping[str, Any], rubric: Rubric | None, marker: str) -> list[Row]:
    """The two rows of a pair: `prompt`, `group`, `side`, and the pair's `id` and `subset` if it has them.

    Args:
        record: `prompt`, `chosen` and `rejected`, text or chat messages (in which the prompt may stand, as in TRL's
            preference datasets); or `chosen_instruction` and `rejected_instruction`, which are whole prompts.
        rubric: What both are judged by; not needed for whole prompts.
        marker: What the judge is asked to write before its score.

    Raises:
        ValueError: No rubric where one is needed; or a response is missing.
    """
    carried = {name: record[name] for name in ("id", "subset") if record.get(name) is not None}
    if set(_WHOLE) <= record.keys():
        if not all(isinstance(record[name], str) for name in _WHOLE):
            raise ValueError(f"one of `{_WHOLE[0]}` and `{_WHOLE[1]}` is empty or not text")
        prompts = [cleaned_instruction(record[name]) for name in _WHOLE]
        group = prometheus_question(prompts[0])
    else:
        if rubric is None:
            raise ValueError(
                "this is a pair of responses (chosen, rejected). Say how to judge them with --rubric RUBRIC.yaml"
            )
        asked, responses = record.get("prompt"), [record[side] for side in SIDES]
        for name in ("prompt", *SIDES):
            if isinstance(text := record.get(name), str):
                no_spelled_messages(name, text)
        texts = [_text(response[-1:] if isinstance(response, list) else response) for response in responses]
        if not all(text.strip() for text in texts):
            raise ValueError("one of `chosen` and `rejected` is empty")
        if asked is None and not isinstance(responses[0], str):
            asked = responses[0][:-1]
        question, reference = _text(asked), record.get("reference")
        prompts = [rubric.prompt(question, text, reference, marker) for text in texts]
        group = str(record.get("group") or question)
    return [
        {"prompt": prompt, "group": group, "side": side, **carried} for prompt, side in zip(prompts, SIDES, strict=True)
    ]


def _text(prompt: Any) -> str:
    """A prompt or response as text; of a single message its content alone."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    if not isinstance(prompt, list) or not all(isinstance(turn, Mapping) for turn in prompt):
        raise ValueError(f"{prompt!r:.80} is neither text nor a list of chat messages")
    turns = [{**turn, "content": text_of(turn.get("content"))} for turn in prompt]
    return turns[0]["content"] if len(turns) == 1 else prompt_text(turns)


@dataclass(frozen=True)
class PairReport:
    """How often a judge prefers the response that people chose. Printed, it is a table.

    Attributes:
        accuracy: Share of pairs whose chosen response has the higher score, a tie counted as half a pair.
        subsets: The same by subset, in the order of their names; empty where the pairs name none.
        n: Pairs with two scores.
        failed: Pairs that lack a score, kept out of the share.
        ties: Pairs with two equal scores.
        n_groups: Prompts that were resampled.
        counts: Pairs with two scores in each subset.
    """

    accuracy: Interval
    subsets: dict[str, Interval]
    n: int
    failed: int
    ties: int
    n_groups: int
    counts: dict[str, int]

    def __str__(self) -> str:
        width = max(map(len, ["all pairs", *self.subsets]))
        lines = [
            f"{'':<{width}}  pairs  chosen scored higher [95 %]",
            f"{'all pairs':<{width}}  {self.n:>5}  {self.accuracy}",
        ]
        lines += [f"{name:<{width}}  {self.counts[name]:>5}  {share}" for name, share in self.subsets.items()]
        lines.append(
            f"{self.n} of {self.n + self.failed} pairs scored, {self.failed} failed. Ties: {self.ties}, each counted "
            f"as half. Intervals: bootstrap over {self.n_groups} prompts"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; NaN becomes None."""
        return {
            "accuracy": self.accuracy.to_dict(),
            "subsets": {name: share.to_dict() | {"n": self.counts[name]} for name, share in self.subsets.items()},
            **{name: getattr(self, name) for name in ("n", "failed", "ties", "n_groups")},
        }


def pair_report(records: Sequence[Mapping[str, Any]], *, n_bootstrap: int = 1000, seed: int = 0) -> PairReport:
    """How often the chosen response is scored above the rejected one, with 95 % intervals.

    Args:
        records: Judgements of `pair_rows` in their order: `score`, `side`, `group` and, if known, `subset`.
        n_bootstrap: Resamples behind each interval, of prompts: pairs that share one are not independent.
        seed: Of the resampling.

    Raises:
        ValueError: The records are not chosen and rejected in turn.

    Example:
        >>> sides = [{"side": "chosen", "score": 4.0}, {"side": "rejected", "score": 2.0}] * 3
        >>> tie = [{"side": "chosen", "score": 3.0}, {"side": "rejected", "score": 3.0}]
        >>> pair_report([record | {"group": str(i // 2)} for i, record in enumerate(sides + tie)]).accuracy.value
        0.875
    """
    if [record.get("side") for record in records] != list(SIDES) * (len(records) // 2):
        raise ValueError("the judgements are not pairs: chosen and rejected responses must alternate")
    pairs = [(records[i], records[i + 1]) for i in range(0, len(records), 2)]
    scored = [(a, b) for a, b in pairs if a["score"] is not None and b["score"] is not None]
    wins = np.array([(1 + np.sign(a["score"] - b["score"])) / 2 for a, b in scored])
    groups = [a.get("group") for a, _ in scored]
    by_subset: dict[str, list[int]] = defaultdict(list)
    for i, (chosen, _) in enumerate(scored):
        if chosen.get("subset") is not None:
            by_subset[str(chosen["subset"])].append(i)

    def share(members: Sequence[int]) -> Interval:
        return _share(wins[list(members)], [groups[i] for i in members], n_bootstrap, seed)

    return PairReport(
        share(range(len(scored))),
        {name: share(by_subset[name]) for name in sorted(by_subset)},
        n=len(scored),
        failed=len(pairs) - len(scored),
        ties=int((wins == 0.5).sum()),
        n_groups=len(set(map(json.dumps, groups))),
        counts={name: len(members) for name, members in by_subset.items()},
    )


def _share(wins: Floats, groups: Sequence[Any], n_bootstrap: int, seed: int) -> Interval:
    if not len(wins):
        return Interval(np.nan, np.nan, np.nan)

    def statistics(counts: Floats) -> dict[str, Floats]:
        return {"accuracy": counts @ wins / counts.sum(axis=1)}

    codes = numbered(map(json.dumps, groups))
    return intervals(statistics, len(wins), codes, n_bootstrap, seed, {"accuracy": "share"})["accuracy"]
