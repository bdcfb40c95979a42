"""Who does the blocks of a run: this process, or workers elsewhere. Knows neither the work nor what starts workers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_tract.files.blocks import Work


@dataclass(frozen=True)
class Crew:
    """What does the blocks of a run, with its model loaded.

    Attributes:
        do: Makes the records of a block: see `BlockLog.run`.
        made_with: All that the records depend on, as settings: what two crews that may share a run have alike.
        max_calls: Blocks that it takes at once, from several threads.
        cancel: Ends the calls under way, after Ctrl-C.
    """

    do: Work
    made_with: Mapping[str, Any]
    max_calls: int = 1
    cancel: Callable[[], None] = lambda: None
