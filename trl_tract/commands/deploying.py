"""Options of serving, merging and starting processes. Imports nothing heavy: `--help` reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_tract.text.options import option, required
from trl_tract.text.secrets import without_secrets

if TYPE_CHECKING:
    from pathlib import Path

    from trl_tract.runs.launching import Launch


@dataclass
class LaunchArguments:
    """Processes of this machine."""

    num_processes: int | None = option(
        None,
        "Processes to train and to generate with. By default one for each accelerator that is seen, or "
        "one. An update keeps its number of rows, and fewer processes train where they do not share it evenly.",
    )
    accelerate_config: str | None = option(
        None,
        "Configuration of accelerate to train with, such as examples/accelerate/fsdp2.yaml. Its "
        "number of processes counts where --num_processes is not given.",
    )


@dataclass
class ClusterArguments:
    """Many machines."""

    engine: str = option(
        "local",
        "local: this machine does the work. ray: workers on the machines of a Ray cluster do it, one for "
        "each GPU or machine, or as many as --num_processes says. RAY_ADDRESS says where the cluster is. Without "
        "it Ray is started on this machine.",
        choices=["local", "ray"],
    )
    export: str | None = option(
        None,
        "Where the result is brought as well: a .jsonl or .parquet file, as a path or an address that "
        "fsspec knows, such as s3://bucket/judgements.parquet.",
    )


@dataclass
class ServeArguments:
    """The judge and its address."""

    model: str = required("Judge model or adapter, saved by TRACTTrainer.")
    rubric: str | None = option(
        None,
        "YAML file with `criterion` and `scores`, for requests with fields. By default the rubric saved "
        "with the model.",
    )
    host: str = option("127.0.0.1", "Address to listen at. 0.0.0.0 lets other machines in: set TRL_TRACT_API_KEY then.")
    port: int = option(8123, "Port to listen at. 0 takes one that is free.")
    name: str | None = option(None, "What /v1/models calls the judge. By default the last part of --model.")
    max_batch: int = option(32, "Items judged together at most.")
    max_queue: int = option(256, "Items that may wait. More are refused with 429.")
    max_items: int = option(64, "Items in one request.")
    max_bytes: int = option(2**20, "Bytes in one request.")
    answer_seconds: float = option(300.0, "How long a request may take. Then it is refused with 504.")

    def limits(self) -> dict[str, Any]:
        """As arguments of the application."""
        names = ("max_batch", "max_queue", "max_items", "max_bytes", "answer_seconds")
        return {name: getattr(self, name) for name in names}


@dataclass
class MergeArguments:
    """The adapter to merge."""

    model: str = required("Judge adapter, saved by TRACTTrainer, on a base that is not quantised.")
    output_dir: str = required("Where the merged judge is written. Has to be empty or not there.")
    dtype: str | None = option(
        None,
        "What the sum is rounded to. By default the base's own 16 bits, or bfloat16.",
        choices=["bfloat16", "float16"],
    )


def planned(args: LaunchArguments) -> "Launch":
    """The processes of a command."""
    from trl_tract.runs.launching import Launch

    return Launch.planned(args.num_processes, args.accelerate_config)


def for_generation(
    args: LaunchArguments, cluster: ClusterArguments, backend: Mapping[str, Any], shard: str | None
) -> tuple[dict[str, Any], "Launch"]:
    """A backend's options, and the processes that generate here: one where other jobs or machines do other shares."""
    from trl_tract.files.export import check_target
    from trl_tract.runs.launching import Launch
    from trl_tract.runs.steps import spread

    if cluster.export:
        check_target(cluster.export)
    if cluster.engine != "local":
        return dict(backend), Launch(sees_all=True)
    alone = backend["name"] == "server" or (shard and args.num_processes is None)
    return spread(backend, Launch() if alone else Launch.planned(args.num_processes))


def who(args: LaunchArguments, cluster: ClusterArguments) -> dict[str, Any]:
    """Who does the blocks, as arguments of a step."""
    return {"engine": cluster.engine, "workers": args.num_processes}


def start_again(launch: "Launch", command: str, arguments: Sequence[str]) -> int:
    """The same command in each of several processes; the exit code of all."""
    return min(1, abs(launch.run("trl_tract.cli", [command, *arguments])))


def deliver(cluster: ClusterArguments, result: "Path") -> None:
    """Bring a result where it is wanted as well."""
    from trl_tract.files.export import export

    if cluster.export:
        export(result, cluster.export)
        print(f"The same is in {without_secrets(cluster.export)}")
