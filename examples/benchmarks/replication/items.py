"""The items of a replication: what is trained on, what settings are chosen on, and, once they are chosen, the tests.

Knows nothing of models.
"""

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from choosing import Choice
from config import Replication
from transformers import PreTrainedTokenizerBase

from trl_tract.demo.task import make_rows
from trl_tract.files.journal import write_jsonl
from trl_tract.sources.door import Source, rows_file, written_rows
from trl_tract.sources.door import held_out as split_groups
from trl_tract.sources.schemas import Item

HELD_OUT = "held-out"
"""The test of a configuration that names none."""


class Items:
    """The items of a configuration, written as rows of one tokenizer's model.

    Items of a test are read with a `Choice` alone, so not before the settings are written down.
    """

    def __init__(self, config: Replication, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        if config.data is None:
            raise ValueError("data is missing: name the file or hub id of the items in the configuration, or --data")
        self.config, self.tokenizer, self.directory = config, tokenizer, directory
        self.chat = bool(tokenizer.chat_template)

    def training(self) -> list[Item]:
        """What may be trained on, in a fixed order by chance: items of one question stand side by side in the file."""
        items = self._of_data()
        if not self.config.tests:
            is_held_out = split_groups(items, self.config.eval_fraction, seed=0)
            items = [item for item in items if not is_held_out(item)]
        return _shuffled(items, self.config.train_rows)

    def split(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """Training items in two: those that settings are tried on, and those they are judged by."""
        count = self.config.choice["items"]
        if self.config.choice.get("by", "question") == "item":
            tried_on, judged = list(items[:-count]), list(items[-count:])
        else:
            is_held_out = split_groups(items, count / len(items), seed=1)
            tried_on = [item for item in items if not is_held_out(item)]
            judged = [item for item in items if is_held_out(item)]
        return tried_on[: self.config.choice.get("rows")], judged

    def tests(self, choice: Choice) -> dict[str, Path]:
        """The file of each test's items. The first call opens the tests.

        Args:
            choice: The settings that were chosen: without them the tests stay closed.
        """
        choice.check(self.config)
        names = list(self.config.tests) or [HELD_OUT]
        files = {name: self.directory / f"{name}.jsonl" for name in names}
        for name, file in files.items():
            if not file.is_file():  # once: later seeds judge what was found then
                items = self._test(name)
                self.write_items(file.name, items)
                print(f"{len(items)} items of {_questions(items)} questions in {name}", flush=True)
        return files

    def write_rows(self, name: str, items: Sequence[Item]) -> Path:
        """Write training rows, one for each annotated rationale."""
        count = self.config.rationales_per_item
        rows = [row for item in items for row in written_rows(item, item.training[:count], self.chat)]
        random.Random(0).shuffle(rows)  # several rows of an item, side by side, would make up a step
        write_jsonl(self.directory / name, rows)
        print(f"{len(rows)} rows of {_questions(items)} questions in {name}", flush=True)
        return self.directory / name

    def write_items(self, name: str, items: Sequence[Item]) -> Path:
        """Write what a judge is asked."""
        rows = (row for item in items for row in written_rows(item, [item.reference], self.chat))
        write_jsonl(self.directory / name, rows)
        return self.directory / name

    def _test(self, name: str) -> list[Item]:
        if self.config.tests:
            items = self._load(self.config.tests[name])
            if self.config.max_questions is not None:
                trained = {item.group for item in self._of_data()}
                items = [item for item in items if item.group in trained] or items
        else:
            items = self._of_data()
            is_held_out = split_groups(items, self.config.eval_fraction, seed=0)
            items = [item for item in items if is_held_out(item)]
        return items if self.config.test_items is None else _shuffled(items, self.config.test_items)

    def _of_data(self) -> list[Item]:
        items = self._load(str(self.config.data))
        if self.config.max_questions is None:
            return items
        return shortest_questions(items, self.config.max_questions, self.tokenizer)

    def _load(self, name: str) -> list[Item]:
        with _file(name) as source:
            rows = Source(source, self.config.scales, self.config.own, invalid_rows="drop")
            items = [item for _, item in rows.items()]
        if not self.config.drop_reference:
            return items

        def shorten(row: dict[str, Any]) -> dict[str, Any]:
            return {**row, "prompt": without_reference(row["prompt"])} if isinstance(row["prompt"], str) else row

        return [
            replace(item, training=tuple(map(shorten, item.training)), reference=shorten(item.reference))
            for item in items
        ]


def shortest_questions(items: Sequence[Item], count: int, tokenizer: Any) -> list[Item]:
    """The items of the `count` questions whose longest prompt is shortest."""
    longest: dict[str, int] = {}
    for item in items:
        tokens = len(tokenizer(str(item.reference["prompt"]))["input_ids"])
        longest[item.group] = max(tokens, longest.get(item.group, 0))
    kept = set(sorted(longest, key=longest.__getitem__)[:count])
    return [item for item in items if item.group in kept]


def without_reference(prompt: str) -> str:
    """A prometheus prompt without its reference answer, and without the words that announce one."""
    prompt = re.sub(r"###Reference Answer.*?(?=###Score Rubric)", "", prompt, flags=re.DOTALL)
    return prompt.replace("a reference answer that gets a score of 5, ", "")


@contextmanager
def _file(name: str) -> Iterator[str]:
    """A file or hub id; the demo's rows are made."""
    kind, _, rest = name.partition(":")
    if kind != "demo":
        yield name
        return
    split, count = rest.split(":")
    with rows_file(enumerate(make_rows(split, int(count)))) as file:
        yield str(file)


def _shuffled(items: Sequence[Item], count: int | None) -> list[Item]:
    """The first `count` in an order by chance, so that fewer are a part of more."""
    shuffled = list(items)
    random.Random(0).shuffle(shuffled)
    return shuffled[:count]


def _questions(items: Sequence[Item]) -> int:
    return len({item.group for item in items})
