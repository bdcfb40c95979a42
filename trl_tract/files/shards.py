"""Which share of a run's blocks a worker does. Knows nothing of blocks or files."""

import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Which of the blocks a worker does.

    Attributes:
        index: Number of the worker, from 0.
        count: Workers there are.
        helps: Whether it goes on with the blocks of slower workers when its own are done, and waits for the last of
            them. So do the processes of one launcher; the jobs of an array end when their share is done.
    """

    index: int = 0
    count: int = 1
    helps: bool = False

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `i/n`, i from 1 to n, as on the command line.

        Example:
            >>> Shard.parse("2/8")
            Shard(index=1, count=8, helps=False)
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"shard {text!r} must be i/n with i from 1 to n, such as 1/8 for the first of eight jobs")
        return cls(int(found[1]) - 1, int(found[2]))

    @classmethod
    def from_launcher(cls) -> "Shard":
        """This process among those that `torchrun` or `accelerate launch` started; without them, the only one."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ.get("RANK", "0")), count, helps=count > 1)

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"
