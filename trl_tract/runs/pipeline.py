"""Both stages in order, resumable: each step's result is on disk, and a run goes on at the first unfinished one."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import AutoTokenizer

from trl_tract.backends.loading import check_model
from trl_tract.evaluation.report import ScoreReport
from trl_tract.files.journal import guard, write_json, write_jsonl
from trl_tract.runs.judged import Judged
from trl_tract.runs.results import finish_card, write_run_page
from trl_tract.runs.spec import RunSpec
from trl_tract.runs.steps import DistillStep, JudgeStep, Step, TrainStep, run_step
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.schemas import Item, load_items, split_items, written_rows

say_now: Callable[[str], None] = partial(print, flush=True)
JUDGED = {"stage one": "judged-stage1", "TRACT": "judged-tract"}
"""The judges of a run, the one that is compared with the others last, and their folders of judgements."""
STEPS: Mapping[str, str] = {
    "prepare": "Reading the rows",
    "stage1": "Stage one: the seed model on the annotated rationales",
    "distill": "Self-generation: the stage-one model writes its own rationales",
    "stage2": "Stage two: the seed model again, on those rationales",
    "judge-stage1": "Judging the held-out items with the stage-one model",
    "judge-tract": "Judging the held-out items with the TRACT model",
    "report": "Writing the report",
}
"""The steps of a run in their order, and what they are called."""


class Run:
    """A directory of finished steps.

    Args:
        directory: Made if it is missing.
        settings: Whatever changes the results: a directory with other settings is refused.
        isolate: Run each step in a process of its own; by default on a GPU.
        total: Steps there will be, for the headings.
        say: Prints the headings.

    Raises:
        FileExistsError: The directory holds another run, of which something is finished.
        RuntimeError: It holds another one, which is being done.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        *,
        isolate: bool | None = None,
        total: int,
        say: Callable[[str], None] = say_now,
    ) -> None:
        try:
            guard(directory, settings, "run")
        except FileExistsError:
            if not nothing_trained(directory):
                raise
            # A mistake in the options, mended: nothing is lost, and another directory would only be a nuisance.
            with _alone(directory):
                say("The settings changed before anything was trained: starting anew")
                (directory / "steps.json").unlink(missing_ok=True)
                write_json(directory / "settings.json", settings)
        self.directory = directory
        self.isolate = torch.cuda.is_available() if isolate is None else isolate
        self.total = total
        self.say = say
        self._file = directory / "steps.json"
        self.seconds = finished_steps(directory)
        self._met = 0

    def step(self, name: str, title: str, work: Step | Callable[[], None]) -> None:
        """Do `work` unless it is finished, and write down how long it took.

        Raises:
            RuntimeError: Another process is at work in the directory.
        """
        self._met += 1
        heading = f"[{self._met}/{self.total}] {title}"
        with _alone(self.directory):
            self.seconds = finished_steps(self.directory)  # another process may have gone on meanwhile
            if name in self.seconds:
                self.say(f"{heading}: finished before, in {self.seconds[name]:.0f} s")
                return
            self.say(heading)
            started = time.monotonic()
            if callable(work):
                work()
            else:
                run_step(work, self.directory / f"{name}.json", isolate=self.isolate)
            self.seconds[name] = time.monotonic() - started
            write_json(self._file, self.seconds)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep other processes out of a run's directory.

    Raises:
        RuntimeError: One is at work there.
    """
    lock = FileLock(directory / "run.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise RuntimeError(
            f"another process is at work in {directory}. Wait until it ends, or stop it: two runs would write the same "
            "files"
        ) from error
    try:
        yield
    finally:
        lock.release()


def nothing_trained(directory: Path) -> bool:
    """Whether a run was begun in the directory, but came to no result that would be missed."""
    if not (directory / "settings.json").exists():
        return False
    return not finished_steps(directory).keys() - {"prepare"} and not any(directory.glob("*/checkpoint-*"))


def finished_steps(directory: Path) -> dict[str, float]:
    """The steps of a run that are finished, with the seconds that each took."""
    file = directory / "steps.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


@dataclass(frozen=True)
class RunResult:
    """What a run ends with.

    Attributes:
        model: Directory of the TRACT model.
        reports: Judge name -> agreement with the gold scores of the held-out items. With several aspects one for each:
            `TRACT, tone`; the next two likewise.
        grid_mass: Judge name -> mean probability on the grid; None where no item has a score.
        errors: Judge name -> why items have no score, and how many of them for that reason, commonest first.
        seconds: Step name -> seconds it took.
    """

    model: Path
    reports: dict[str, ScoreReport]
    grid_mass: dict[str, float | None]
    errors: dict[str, dict[str, int]]
    seconds: dict[str, float]


def run_tract(
    model: str,
    data: str,
    output_dir: str | Path,
    *,
    eval_data: str | None = None,
    eval_fraction: float = 0.1,
    rubric: str | Path | None = None,
    columns: Sequence[str] | Mapping[str, str] | None = None,
    training: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    num_generations: int = 1,
    on_failure: str = "keep_gold",
    keep_annotated: bool = False,
    backend: Mapping[str, Any] | None = None,
    isolate: bool | None = None,
    say: Callable[[str], None] = say_now,
) -> RunResult:
    """Train a judge with TRACT: stage one, self-generation, stage two from the seed model, evaluation.

    Run again with the same arguments, it goes on at the first step that is not finished.

    Args:
        model: Seed model: directory or hub id. Both stages start from it.
        data: A .jsonl, .json, .csv or .parquet file, or a hub id; see `docs/data.md`.
        output_dir: Holds one run.
        eval_data: Held-out items; without them `eval_fraction` of the groups of `data` is held out.
        eval_fraction: Part of the groups that is held out.
        rubric: YAML file with `criterion` and `scores`, for rows of instructions and responses: see `columns.Rubric`.
        columns: The rows' columns as `role=column`, or role -> column: see `columns.ROLES`.
        training: Fields of TRACTConfig, for both stages.
        model_args: Fields of TRL's ModelConfig: dtype, LoRA, quantisation.
        generation: Sampling of rationales, in self-generation and judging: `temperature`, `top_p`,
            `repetition_penalty`, `max_new_tokens`, `seed`, `max_attempts`.
        num_generations: Stage-two rows for each prompt.
        on_failure: What happens to rationales that never reach the marker: see CoTSelfDistill.
        keep_annotated: Stage two on annotated and self-written rationales, not on the latter alone.
        backend: What generates: `name` (`transformers` or `vllm`) and arguments of that backend, such as `batch_size`.
        isolate: Run each step in a process of its own; by default on a GPU.
        say: Prints the headings.
    """
    spec = RunSpec(
        model,
        data,
        eval_data=eval_data,
        eval_fraction=eval_fraction,
        own=OwnColumns.parse(columns, rubric),
        training=dict(training or {}),
        model_args=dict(model_args or {}),
        generation=dict(generation or {}),
        num_generations=num_generations,
        on_failure=on_failure,
        keep_annotated=keep_annotated,
        backend=dict(backend or {}),
    )
    return carry_out(spec, Path(output_dir), isolate=isolate, say=say)


def carry_out(
    spec: RunSpec, directory: Path, *, isolate: bool | None = None, say: Callable[[str], None] = say_now
) -> RunResult:
    """What `run_tract` does, with its arguments checked and in one place."""
    if spec.backend.get("name") == "server":
        raise ValueError(
            "a server cannot serve models that a run has yet to train: use the backend vllm or transformers"
        )
    run = Run(directory, spec.settings(), isolate=isolate, total=len(STEPS), say=say)
    train_file, eval_file = directory / "train.jsonl", directory / "eval.jsonl"
    scales = spec.scales

    def prepare() -> None:
        check_model(spec.model)
        items = load_items(spec.data, scales, spec.own)
        if spec.eval_data is None:
            items, held_out = split_items(items, spec.eval_fraction, spec.seed)
        else:
            held_out = load_items(spec.eval_data, scales, spec.own)
        tokenizer = AutoTokenizer.from_pretrained(spec.model)
        write_items(items, held_out, train_file, eval_file, chat=bool(tokenizer.chat_template))

    run.step("prepare", STEPS["prepare"], prepare)
    say(f"    {_count(train_file)} training rows, {_count(eval_file)} held-out items")

    def train(rows: Path, name: str) -> TrainStep:
        return TrainStep(
            spec.model, str(rows), str(directory / name), training=dict(spec.training), model_args=dict(spec.model_args)
        )

    def judge(name: str) -> JudgeStep:
        judged = directory / f"judged-{name}"
        return JudgeStep(str(directory / name), str(eval_file), str(judged), dict(spec.generation), dict(spec.backend))

    run.step("stage1", STEPS["stage1"], train(train_file, "stage1"))
    distill = DistillStep(
        str(directory / "stage1"),
        str(train_file),
        str(directory / "self-generated"),
        {
            **spec.generation,
            "num_generations": spec.num_generations,
            "on_failure": spec.on_failure,
            "keep_annotated": spec.keep_annotated,
        },
        dict(spec.backend),
    )
    run.step("distill", STEPS["distill"], distill)
    stage_two_rows = directory / "self-generated" / "rows.jsonl"
    run.step("stage2", STEPS["stage2"], train(stage_two_rows, "tract"))
    run.step("judge-stage1", STEPS["judge-stage1"], judge("stage1"))
    run.step("judge-tract", STEPS["judge-tract"], judge("tract"))
    judges = {name: Judged(directory / folder) for name, folder in JUDGED.items()}
    result = summarise(directory, judges, run.seconds)

    def report() -> None:
        write_report(directory, result)
        for scale in judges["TRACT"].scales:
            judged = {name: judge.scales[scale] for name, judge in judges.items()}
            write_run_page(directory, judged, result.reports, say)
            own = result.reports[judged["TRACT"].called("TRACT")]
            finish_card(directory, judged["TRACT"], own, data=spec.data, held_out=spec.eval_data or spec.data)

    run.step("report", STEPS["report"], report)
    return result


def write_items(training: list[Item], held_out: list[Item], train_file: Path, eval_file: Path, *, chat: bool) -> None:
    """Write the training rows and the evaluation rows of items.

    Raises:
        ValueError: There is no row to train on.
    """
    rows = written_rows(training, lambda item: item.training, chat=chat)
    if not rows:
        raise ValueError("none of the rows has a completion, so there is no rationale to train on")
    write_jsonl(train_file, rows)
    write_jsonl(eval_file, written_rows(held_out, lambda item: (item.reference,), chat=chat))


def summarise(directory: Path, judges: Mapping[str, Judged], seconds: dict[str, float]) -> RunResult:
    """Agreement of each judge with the gold scores, by aspect."""
    scales = {scale.called(name): scale for name, judge in judges.items() for scale in judge.scales.values()}
    return RunResult(
        directory / "tract",
        {name: scale.report() for name, scale in scales.items()},
        {name: scale.mean_grid_mass for name, scale in scales.items()},
        {name: scale.errors for name, scale in scales.items()},
        seconds,
    )


def write_report(directory: Path, result: RunResult) -> None:
    """Write `report.json`: every judge's figures."""
    write_json(
        directory / "report.json",
        {
            "judges": {
                name: {**report.to_dict(), "grid_mass": result.grid_mass[name], "errors": result.errors[name]}
                for name, report in result.reports.items()
            },
            "seconds": result.seconds,
        },
    )


def _count(file: Path) -> int:
    with file.open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)
