"""Texts written side by side, each in a row of one batch: where one ends, the next one begins at once.

Knows how rows are laid out; knows nothing of a model but its passes, nor of where a text's end counts.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache

from trl_tract.backends.continuation import Continuation
from trl_tract.backends.drawing import Drawing
from trl_tract.backends.forward import Forward
from trl_tract.backends.key_values import KeyValueTree, read_row, roomy_cache
from trl_tract.backends.room import Room
from trl_tract.backends.stop_text import Ending, Watch

_AHEAD = 64  # columns that a batch has room for before it is laid out anew


class Decoding:
    """Writes continuations.

    Args:
        keeps: Whether the tree takes finished texts too: what is asked next goes on from them.
    """

    def __init__(
        self,
        forward: Forward,
        tree: KeyValueTree,
        room: Room,
        drawing: Drawing,
        ending: Ending,
        eos: Sequence[int],
        *,
        keeps: bool,
    ) -> None:
        self.forward, self.tree, self.room, self.drawing = forward, tree, room, drawing
        self.ending, self.eos, self.keeps = ending, frozenset(eos), keeps
        self._empty()

    def _empty(self) -> None:
        self.texts: list[Continuation | None] = []  # of each row; None where one has left
        self.watches: list[Watch | None] = []
        self.cache: DynamicCache = roomy_cache(self.forward.layers, 0, 0, 0)
        self.columns = self.used = 0
        # Of each row and column: its token, and whether there is one. Without, some token of the row stands there.
        self.ids = self.kept = torch.zeros(0, 0, dtype=torch.long)

    def run(self, pending: deque[Continuation], finished: Callable[[Sequence[Continuation]], None]) -> None:
        """Write all of `pending`, from the left; `finished` is told which have come to an end, step by step."""
        while pending or any(self.texts):
            entering: list[Continuation] = []
            out_of_memory = False
            try:
                entering = self._next(pending)
                self._enter(entering, pending)
                finished(self._step())
            except torch.OutOfMemoryError:
                out_of_memory = True
            if out_of_memory:  # Outside the handler: the exception's frames hold the batch's tensors.
                written = [text for text in self.texts if text is not None and text not in pending]
                entering = [text for text in entering if text in pending]
                pending.extendleft(reversed(written))
                self._empty()
                self.tree.shrink()
                self.room.shrink(len(written) + len(entering))
        self._empty()

    def _active(self) -> list[int]:
        return [row for row, text in enumerate(self.texts) if text is not None]

    def _next(self, pending: deque[Continuation]) -> list[Continuation]:
        """Those of `pending`, from the left, that there is room for."""
        rows = len(self._active())
        length = self.columns if rows else 0
        entering: list[Continuation] = []
        for text in pending:
            length = max(length, len(text.before) + min(_AHEAD, text.room))
            if not self.room.fits(rows + len(entering) + 1, length):
                break
            entering.append(text)
        return entering

    def _enter(self, entering: Sequence[Continuation], pending: deque[Continuation]) -> None:
        """Give new texts a row each, the prompts' keys and values computed as far as the tree does not know them."""
        before = list({tuple(text.before): text.before for text in entering}.values())
        self.forward.learn(before, self.tree, self.room.fits)
        free = [row for row, text in enumerate(self.texts) if text is None]
        longest = max((len(text.before) for text in entering), default=0)
        idle = len(free) - len(entering)
        # Rows that stay empty cost as much as others.
        if idle < 0 or longest > self.used or self.used == self.columns or 4 * idle > len(self.texts):
            self._lay_out(entering, pending)
        else:
            for row, text in zip(free, entering, strict=False):
                self._place(row, text)
        for text in entering:
            pending.remove(text)
        self.tree.trim()

    def _lay_out(self, entering: Sequence[Continuation], pending: deque[Continuation]) -> None:
        """A new batch of the texts under way and new ones, with room ahead; the last ones wait if it is too much."""
        rows = self._active()

        def columns() -> tuple[int, int]:
            texts = [*(self._text(row) for row in rows), *entering]
            used = max((len(text.before) for text in texts), default=0)
            return used, used + min(_AHEAD, max((text.room for text in texts), default=0))

        used, total = columns()
        while not entering and not self.room.fits(len(rows), total):
            row = rows.pop()
            pending.appendleft(self._text(row))
            self._keep(row)
            used, total = columns()
        texts = [self._text(row) for row in rows]
        watches = [self.watches[row] for row in rows]
        cache = roomy_cache(self.forward.layers, len(rows) + len(entering), used, total)
        for new, old in zip(cache.layers, self.cache.layers, strict=True):
            for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
                start = self.used - len(text.before)
                if start < self.used:
                    new.put(place, used, old.keys[row, :, start : self.used], old.values[row, :, start : self.used])
            old.whole = old.keys = old.values = None  # a layer at a time, so that there are never two of all
        device = self.forward.model.device
        self.cache, self.used, self.columns = cache, used, total
        self.texts, self.watches = [*texts, *([None] * len(entering))], [*watches, *([None] * len(entering))]
        self.ids = torch.zeros(len(self.texts), total, dtype=torch.long, device=device)
        self.kept = torch.zeros(len(self.texts), total, dtype=torch.bool, device=device)
        for place, text in enumerate(texts):
            self._describe(place, text)
        for place, text in enumerate(entering):
            self._place(len(texts) + place, text)

    def _place(self, row: int, text: Continuation) -> None:
        self.texts[row], self.watches[row] = text, text.watch(self.ending)
        self.tree.fill(self.cache, row, self.used, text.before)
        self._describe(row, text)

    def _describe(self, row: int, text: Continuation) -> None:
        before = text.before
        self.kept[row, : self.used] = torch.arange(self.used, device=self.kept.device) >= self.used - len(before)
        tokens = [text.last] * (self.used - len(before)) + before
        self.ids[row, : self.used] = torch.tensor(tokens, dtype=torch.long, device=self.ids.device)

    def _text(self, row: int) -> Continuation:
        text = self.texts[row]
        assert text is not None
        return text

    def _keep(self, row: int) -> None:
        """Let the tree know what stands in a row."""
        before = self._text(row).before
        known, start = self.tree.length(before), self.used - len(before)
        self.tree.add(before, known, read_row(self.cache, row, start + known, self.used))

    def _step(self) -> list[Continuation]:
        """One token for each text; those that it ends."""
        last = [0 if text is None else text.last for text in self.texts]
        self.ids[:, self.used] = torch.tensor(last, device=self.ids.device)
        self.kept[:, self.used] = True
        self.used += 1
        inputs = self.ids[:, self.used - 1 : self.used]
        logits = self.forward(inputs, self.kept[:, : self.used], self.cache)
        numbers = [0.0 if text is None else text.number for text in self.texts]
        drawn: list[int] = self.drawing(self.ids[:, : self.used], logits, numbers).tolist()
        finished = []
        for row, (text, watch, token) in enumerate(zip(self.texts, self.watches, drawn, strict=True)):
            if text is None or watch is None:
                continue
            text.written.append(token)
            text.end(self.eos, watch(text.written))
            if not text.goes_on:
                if self.keeps or text.doubt is not None:
                    self._keep(row)
                self.texts[row] = self.watches[row] = None
                finished.append(text)
        return finished
