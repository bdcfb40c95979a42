"""The door: whatever `--data` names -> the same items or refusals for every command, under the file's row numbers.

Rows are read when they are asked for; none are kept. Knows nothing of tokens, or of what is done with the rows.
"""

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from trl_tract.files.journal import write_json, write_jsonl
from trl_tract.rows.refusals import Refusal, refuse
from trl_tract.rows.row import REFUSED, Row
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.files import read_records
from trl_tract.sources.preferences import SIDES
from trl_tract.sources.schemas import Item, as_text, has_rationale, read_items, scored_alone
from trl_tract.text.secrets import without_secrets

Bare = Literal["none", "lacking", "all"]


@dataclass(frozen=True)
class Source:
    """Rows that can be gone through again and again, each time from their file.

    Attributes:
        name: A file or hub id: see `files.read_records`.
        scales: How its rows write their scores.
        own: The user's rubric and column names; None: a schema that is known.
        invalid_rows: `raise`, or `drop` to go on without the records that are refused.
        say: Told what was dropped, once.
        writes: Whether rationales are to be written for the items that have none. A completion of scores alone is none
            then, and one whose scores cannot be found is refused here, before anything is written.
        bare: Which items are trained on as prompts and gold scores alone: `none` of them, those `lacking` a rationale,
            or `all`.
    """

    name: str
    scales: tuple[Scale, ...]
    own: OwnColumns | None = None
    invalid_rows: str = "raise"
    say: Callable[[str], None] = print
    bare: Bare = "none"
    writes: bool = False
    _said: list[str] = field(default_factory=list, compare=False)

    @property
    def title(self) -> str:
        """What messages call it."""
        return Path(self._shown).name

    @property
    def _shown(self) -> str:
        return str(without_secrets(self.name))

    def found(self, *, judged: bool = False) -> Iterator[tuple[int, Item | Refusal]]:
        """Each record's number with its item, or why there is none; a pair has two items.

        Args:
            judged: Whether the rows are only to be judged: see `schemas.read_items`.

        Raises:
            FileNotFoundError: No such file or dataset.
            ValueError: It cannot be read as a whole, holds no rows, or lacks a column that was named.
        """
        if self.own is not None:
            self.own.check(self.scales)
        number, seen = -1, set[str]()
        for number, record in enumerate(read_records(self.name)):
            if isinstance(record, ValueError):
                yield number, Refusal(number, "not JSON", str(record))
                continue
            seen.update(record)
            try:
                own = None if self.own is None else self.own.of(record)
                items = read_items(record, self.scales, own, judged=judged)
                items = [self._with_rationales(item) for item in items] if self.writes else items
            except ScoreNotFoundError as error:
                yield number, Refusal(number, error.kind, str(error))
            except KeyError as error:
                yield number, Refusal(number, "not understood", f"column {error} is missing")
            except (ValueError, TypeError, AttributeError, IndexError) as error:
                yield number, Refusal(number, "not understood", str(error))
            else:
                yield from ((number, item if judged else self._bared(item)) for item in items)
        if number < 0:
            raise ValueError(f"{self._shown} holds no rows")
        absent = [] if self.own is None else self.own.absent(seen)
        if absent:
            raise ValueError(
                f"{self._shown}: there is no column {', '.join(absent)}. The columns are {', '.join(sorted(seen))}"
            )

    def items(self) -> Iterator[tuple[int, Item]]:
        """The items with their records' numbers; what is refused ends this, or is left out and said.

        Raises:
            FileNotFoundError, ValueError: See `found`; or a record is refused, or none is left. All are counted first.
        """
        refused, taken = [], 0
        for number, item in self.found():
            if isinstance(item, Refusal):
                refused.append(item)
            else:
                taken += 1
                yield number, item
        refuse(refused, taken + len(refused), self.title, invalid_rows=self.invalid_rows, say=self._tell)

    def training_rows(self, chat: bool, keep: Callable[[Item], bool] = lambda item: True) -> Iterator[tuple[int, Row]]:
        """The training rows of the items that `keep` takes; those without a rationale are counted and said."""
        taken = without = 0
        for number, item in self.items():
            if keep(item):
                taken += len(item.training)
                without += not item.training
                yield from ((number, row) for row in written_rows(item, item.training, chat))
        if not taken:
            raise ValueError(
                f"{self._shown}: no row has a completion or rationale, so there is nothing to train on. Write "
                "rationales with `trl-tract bootstrap`, or use `trl-tract run`, which writes them itself. Or train "
                "without rationales: --drop_rationale true"
            )
        if without:
            self._tell(
                f"{without:,} rows of {self.title} have a score but no completion, so they are not used for training. "
                "`trl-tract bootstrap` writes rationales for them"
            )

    def rows(self, chat: bool, select: Callable[[Item], Iterable[Row]]) -> Iterator[tuple[int, Row]]:
        """The rows of each item that `select` takes."""
        for number, item in self.items():
            yield from ((number, row) for row in written_rows(item, select(item), chat))

    def judged_rows(self, chat: bool) -> Iterator[tuple[int, Row]]:
        """What a judge is asked: a row for each record, or two for a pair; a refused one says so in `REFUSED`."""
        for number, item in self.found(judged=True):
            if isinstance(item, Refusal):
                refused: Row = {"prompt": "", REFUSED: f"row {number}: {item.message}"}
                sides = [{"side": side} for side in SIDES] if item.kind == "pair" else [{}]
                yield from ((number, refused | side) for side in sides)
            else:
                yield from ((number, row) for row in written_rows(item, [item.reference], chat))

    def _with_rationales(self, item: Item) -> Item:
        if not item.reference:  # tokens
            return item
        return replace(item, training=tuple(row for row in item.training if has_rationale(row, self.scales)))

    def _bared(self, item: Item) -> Item:
        is_bare = self.bare == "all" or (self.bare == "lacking" and not item.training)
        if not is_bare or not item.reference:  # rows that came as tokens are as they are
            return item
        return replace(item, training=(scored_alone(item.reference, self.scales),), bare=True)

    def _tell(self, what: str) -> None:
        if what not in self._said:
            self._said.append(what)
            self.say(what)


def held_out(
    items: Iterable[Item], fraction: float, seed: int, by: Callable[[Item], str] = attrgetter("group"), fewest: int = 1
) -> Callable[[Item], bool]:
    """Whether an item is held out, if about `fraction` of the groups are; a group is never split.

    Args:
        items: All there are.
        fraction: Part of the groups.
        seed: Of the choice.
        by: What an item shares with those that it must not be parted from; its group.
        fewest: Groups to hold out where `fraction` comes to fewer, unless they are more than a third of all.

    Raises:
        ValueError: There are too few groups for both sides to have one.
    """
    groups = list(dict.fromkeys(_digest(by(item)) for item in items))
    count = round(len(groups) * fraction)
    if count < fewest <= len(groups) / 3:
        count = fewest
    if not 0 < count < len(groups):
        raise ValueError(
            f"holding out {fraction:g} of {len(groups)} group(s) leaves one side empty. Give an evaluation file or "
            "another fraction"
        )
    random.Random(seed).shuffle(groups)
    chosen = set(groups[:count])
    return lambda item: _digest(by(item)) in chosen


def group_of(row: Mapping[str, Any]) -> bytes:
    """The group of a training row, as `held_out_rows` reads it; one without a group belongs to its prompt's."""
    return _digest(json.dumps(row.get("group") or row.get("prompt") or row.get("messages"), default=str))


def held_out_rows(groups_of_rows: Iterable[bytes], count: int, seed: int) -> set[int]:
    """Places of about `count` rows, whole groups of them."""
    groups: dict[bytes, list[int]] = {}
    for place, group in enumerate(groups_of_rows):
        groups.setdefault(group, []).append(place)
    order, taken = sorted(groups), set[int]()
    random.Random(seed).shuffle(order)
    for digest in order:
        if len(taken) < count:
            taken.update(groups[digest])
    if len(taken) == sum(map(len, groups.values())):
        raise ValueError(
            f"holding out {count} of {len(taken)} rows in {len(groups)} group(s) for judging during training "
            "leaves no training rows. Lower judge_eval_items, or give eval_data"
        )
    return taken


def _digest(group: str) -> bytes:
    """A group in 16 bytes: there may be as many of them as rows, and as long as prompts."""
    return hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def written_rows(item: Item, rows: Iterable[Row], chat: bool) -> Iterator[Row]:
    """Rows of an item; a prompt that was made here is chat messages where the model's tokenizer has a template."""
    return (as_text(row, chat) if item.converted else row for row in rows)


def write_rows(path: Path, rows: Iterable[tuple[int, Row]]) -> int:
    """Write rows as JSONL and, beside it, the numbers of their records; how many there were."""
    numbers: list[int] = []

    def each() -> Iterator[Row]:
        for number, row in rows:
            numbers.append(number)
            yield row

    count = write_jsonl(path, each())
    write_json(number_file(path), numbers)
    return count


def number_file(path: Path) -> Path:
    """Where the numbers stand that the rows of a JSONL file have in the file they came from."""
    return path.with_name(f"{path.stem}.numbers.json")


@contextmanager
def rows_file(rows: Iterable[tuple[int, Row]]) -> Iterator[Path]:
    """A JSONL file of rows for as long as a step needs it."""
    with tempfile.TemporaryDirectory(prefix="trl-tract-") as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        yield path
