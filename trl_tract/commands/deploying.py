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
    """Processes on this machine."""

    num_processes: int | None = option(
        None,
        "Number of processes for training and generation. Defaults to one per visible accelerator, or one without "
        "accelerators. The number of rows in an update stays the same. Fewer processes train if it cannot be divided "
        "evenly among them.",
    )
    accelerate_config: str | None = option(
        None,
        "Accelerate configuration file for training, such as examples/accelerate/fsdp2.yaml. Its number of processes "
        "is used unless --num_processes is given.",
    )


@dataclass
class ClusterArguments:
    """Several machines."""

    engine: str = option(
        "local",
        "local: run on this machine. ray: run workers on a Ray cluster, one per GPU or machine, or --num_processes of "
        "them. Set RAY_ADDRESS to the address of the cluster. Without it, Ray is started on this machine.",
        choices=["local", "ray"],
    )
    export: str | None = option(
        None,
        "Also write the result to this .jsonl or .parquet file: a path, or an address that fsspec supports, such as "
        "s3://bucket/judgements.parquet.",
    )


@dataclass
class ServeArguments:
    """The judge and the server."""

    model: str = required("Judge model or adapter, saved by TRACTTrainer.")
    rubric: str | None = option(
        None,
        "YAML file with `criterion` and `scores`, for requests that send fields instead of a prompt. Defaults to the "
        "rubric saved with the model.",
    )
    host: str = option(
        "127.0.0.1",
        "Address to listen on. 0.0.0.0 accepts requests from other machines; set TRL_TRACT_API_KEY in that case.",
    )
    port: int = option(8123, "Port to listen on. 0 picks a free one.")
    name: str | None = option(None, "Name of the judge in /v1/models. Defaults to the last part of --model.")
    max_batch: int = option(32, "Maximum number of items judged together.")
    max_queue: int = option(256, "Maximum number of waiting items. Further requests are refused with HTTP status 429.")
    max_items: int = option(64, "Maximum number of items in one request.")
    max_bytes: int = option(2**20, "Maximum size of a request, in bytes.")
    answer_seconds: float = option(
        300.0, "Time limit for a request, in seconds. After it, the server answers with HTTP status 504."
    )

    def limits(self) -> dict[str, Any]:
        """As arguments of the application."""
        names = ("max_batch", "max_queue", "max_items", "max_bytes", "answer_seconds")
        return {name: getattr(self, name) for name in names}


@dataclass
class MergeArguments:
    """The adapter to merge."""

    model: str = required("Judge adapter, saved by TRACTTrainer. Its base model must not be quantised.")
    output_dir: str = required("Output directory for the merged judge. It must be empty or must not exist.")
    dtype: str | None = option(
        None,
        "Data type of the merged weights. Defaults to the base model's own 16-bit type, or bfloat16.",
        choices=["bfloat16", "float16"],
    )


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
        print(f"A copy is in {without_secrets(cluster.export)}")
