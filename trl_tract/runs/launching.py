"""How many processes a command is done by, and how they are started: with accelerate, or with torchrun on a CPU.

Knows launchers; knows nothing of what the processes do.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.commands.config.config_args import load_config_from_file

from trl_tract.files.shards import Shard

_STARTED = "TRL_TRACT_STARTED"
_BATCH, _STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"


def is_launched() -> bool:
    """Whether a launcher, or another process of this package, started this process already."""
    return _STARTED in os.environ or Shard.from_launcher().count > 1


@dataclass(frozen=True)
class Launch:
    """The processes of a command.

    Attributes:
        config: A configuration of accelerate's; None: every process holds the whole model.
        sees_all: Whether a single process is shown all accelerators, as an engine that spreads itself over them is.
            A trainer would take them for itself (DataParallel), and TRL's refuse that.
    """

    processes: int = 1
    config: str | None = None
    sees_all: bool = False

    @classmethod
    def planned(cls, asked: int | None, config: str | None = None) -> "Launch":
        """As many processes as were asked for, or as there are accelerators; one under a launcher.

        Args:
            asked: None: what the configuration says, or else all accelerators that are seen, which is what
                CUDA_VISIBLE_DEVICES leaves.
            config: A configuration of accelerate's.

        Raises:
            ValueError: There are fewer accelerators, or the configuration is for several machines.
            FileNotFoundError: There is no such configuration.
        """
        if is_launched():
            return cls()
        said = f"--num_processes {asked}"
        if config is not None and asked is None:
            asked = _processes_of(config)
            said = f"num_processes: {asked} in {config}"
        if asked is not None and asked < 1:
            raise ValueError(f"{said} must be 1 or more")
        seen = accelerators()
        if asked is not None and seen and asked > seen:
            raise ValueError(
                f"{said}, but only {seen} accelerators are visible. Set --num_processes to {seen} or fewer"
            )
        return cls(asked or seen or 1, config)

    @property
    def starts(self) -> bool:
        """Whether other processes than this one are needed."""
        hides = accelerators() > 1 and not self.sees_all and not is_launched()
        return self.processes > 1 or self.config is not None or hides

    def __str__(self) -> str:
        seen = accelerators()
        where = f"on {self.processes} of {seen} accelerators" if seen else "on the CPU"
        config = f", as set in {self.config}" if self.config else ""
        return f"{self.processes} process{'es' if self.processes > 1 else ''} {where}{config}"

    def shared(self, training: Mapping[str, Any]) -> tuple["Launch", dict[str, int]]:
        """The processes that train, and what each makes of an update, which has the rows that it has with one process.

        They are the most that share those rows evenly: first each has fewer batches, then smaller ones.
        """
        rows = rows_of_an_update(training)
        trains = replace(self, processes=max(count for count in range(1, self.processes + 1) if rows % count == 0))
        each = rows // trains.processes
        most = min(int(training.get(_BATCH, 8)), each)
        batch = max(size for size in range(1, most + 1) if each % size == 0)
        return trains, {_BATCH: batch, _STEPS: each // batch}

    def update(self, training: Mapping[str, Any]) -> str:
        """What an update is made of, in words."""
        trains, each = self.shared(training)
        told = (
            f"each update has {trains.processes} x {each[_BATCH]} x {each[_STEPS]} rows, the same number as with "
            "one process"
        )
        if trains.processes == self.processes:
            return told
        return (
            f"{told}. Only {trains.processes} of {self.processes} processes train, because "
            f"{rows_of_an_update(training)} rows cannot be divided evenly among {self.processes} (set {_BATCH} to a "
            f"multiple of {self.processes} to use all of them)"
        )

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
    """Accelerators that are seen, as a trainer counts them: CUDA_VISIBLE_DEVICES hides the others."""
    return torch.cuda.device_count() or torch.accelerator.device_count()


def rows_of_an_update(training: Mapping[str, Any]) -> int:
    """Rows that one process makes an update of."""
    return int(training.get(_BATCH, 8)) * int(training.get(_STEPS, 1))


def _processes_of(config: str) -> int | None:
    if not os.path.isfile(config):
        raise FileNotFoundError(
            f"--accelerate_config {config}: no such file. Give a file written by `accelerate config`"
        )
    settings = load_config_from_file(config)
    if settings.num_machines > 1:
        raise ValueError(
            f"{config} is for {settings.num_machines} machines, but this command starts processes on one machine only. "
            "Run `accelerate launch --config_file ... -m trl_tract.cli train ...` on each of them"
        )
    return None if settings.num_processes == -1 else int(settings.num_processes)
