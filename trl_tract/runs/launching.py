"""How many processes a command is done by, and how they are started: with accelerate, or with torchrun on a CPU.

Knows launchers; knows nothing of what the processes do.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_STARTED = "TRL_TRACT_STARTED"


def is_launched() -> bool:
    """Whether a launcher, or another process of this package, started this process already."""
    return _STARTED in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class Launch:
    """The processes of a command.

    Attributes:
        processes: How many.
        config: A configuration of accelerate's; None: every process holds the whole model.
        sees_all: Whether a single process is shown all accelerators, as an engine that spreads itself over them is.
            A trainer would take them for itself (DataParallel), and TRL's refuse that.
    """

    processes: int = 1
    config: str | None = None
    sees_all: bool = False

    @classmethod
    def planned(cls, asked: int | None, config: str | None = None, *, rows: int | None = None) -> "Launch":
        """As many processes as were asked for, or as there are accelerators; one under a launcher.

        Args:
            asked: None: all accelerators that are seen, which is what CUDA_VISIBLE_DEVICES leaves.
            config: A configuration of accelerate's.
            rows: Rows of an update, which have to be shared out evenly. None: nothing is trained.

        Raises:
            ValueError: They cannot be shared out among as many as were asked for, or there are fewer accelerators.
        """
        if is_launched():
            return cls()
        if asked is not None and asked < 1:
            raise ValueError(f"--num_processes {asked} must be 1 or more")
        seen = accelerators()
        if asked is not None and seen and asked > seen:
            raise ValueError(f"--num_processes {asked}: {seen} accelerators are seen here")
        processes = asked or seen or 1
        if rows is not None and rows % processes:
            fitting = max(count for count in range(1, processes + 1) if rows % count == 0)
            if asked is not None:
                raise ValueError(
                    f"--num_processes {asked}: the {rows} rows of an update (per_device_train_batch_size x "
                    f"gradient_accumulation_steps) cannot be shared out evenly. Give {fitting}, or another batch size"
                )
            processes = fitting
        return cls(processes, config)

    @property
    def starts(self) -> bool:
        """Whether other processes than this one are needed."""
        hides = accelerators() > 1 and not self.sees_all and not is_launched()
        return self.processes > 1 or self.config is not None or hides

    def __str__(self) -> str:
        seen = accelerators()
        where = f"on {self.processes} of {seen} accelerators" if seen else "on the CPU"
        config = f", as {self.config} has it" if self.config else ""
        return f"{self.processes} process{'es' if self.processes > 1 else ''} {where}{config}"

    def share(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """Training settings of each process with which an update has the rows that it has with one process."""
        batch = int(training.get("per_device_train_batch_size", 8))
        steps = int(training.get("gradient_accumulation_steps", 1))
        each = batch * steps // self.processes
        batch = max(size for size in range(1, min(batch, each) + 1) if each % size == 0)
        return {**training, "per_device_train_batch_size": batch, "gradient_accumulation_steps": each // batch}

    def command(self, module: str, arguments: Sequence[str]) -> list[str]:
        """`python -m module arguments`, once in each process."""
        program = [sys.executable, "-m"]
        if self.processes == 1 and self.config is None:
            return [*program, module, *arguments]
        if not accelerators():
            # accelerate's launcher starts one process on a CPU, whatever it is told.
            count = f"--nproc_per_node={self.processes}"
            return [*program, "torch.distributed.run", "--standalone", count, "-m", module, *arguments]
        options = [f"--num_processes={self.processes}"]
        if self.config is not None:
            options.append(f"--config_file={self.config}")
        else:
            options += ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        return [*program, "accelerate.commands.launch", *options, "-m", module, *arguments]

    def run(self, module: str, arguments: Sequence[str], **environment: str) -> int:
        """Start the processes and wait; their exit code."""
        if self.processes == 1 and not self.sees_all and accelerators() > 1:
            # The first of those that this process was shown.
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        environment = {**os.environ, **environment, _STARTED: "1"}
        return subprocess.run(self.command(module, arguments), env=environment, check=False).returncode


def accelerators() -> int:
    """Accelerators that are seen: CUDA_VISIBLE_DEVICES hides the others."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def rows_of_an_update(training: Mapping[str, Any]) -> int:
    """Rows that one process makes an update of."""
    return int(training.get("per_device_train_batch_size", 8)) * int(training.get("gradient_accumulation_steps", 1))
