"""Both stages in order, resumable: each step's result is on disk, and a run goes on at the first unfinished one."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from trl_tract.backends.loading import check_seed, tokenizer_to_train
from trl_tract.files.journal import JsonlRows, changed_settings, read_json
from trl_tract.rows.row import Row
from trl_tract.runs.facts import write_recipe
from trl_tract.runs.judged import Judged
from trl_tract.runs.launching import Launch
from trl_tract.runs.results import (
    JUDGED,
    MODELS,
    RunResult,
    calibrate_judge,
    finish_card,
    summarise,
    write_report,
    write_run_page,
)
from trl_tract.runs.run import Run
from trl_tract.runs.spec import RunSpec, too_few_groups
from trl_tract.runs.step_names import steps_of
from trl_tract.runs.steps import OF_RATIONALES, BootstrapStep, DistillStep, JudgeStep, Step, say_now
from trl_tract.runs.train_steps import RLStep, TrainStep
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.door import write_rows
from trl_tract.sources.schemas import Item
from trl_tract.text.secrets import without_secrets
from trl_tract.training.recipe import tell


def run_tract(
    model: str | PathLike[str],
    data: str | PathLike[str],
    output_dir: str | Path,
    *,
    eval_data: str | PathLike[str] | None = None,
    eval_fraction: float | None = None,
    rubric: str | Path | None = None,
    columns: Sequence[str] | Mapping[str, str] | None = None,
    training: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    num_generations: int = 1,
    on_failure: str = "keep_gold",
    keep_annotated: bool = False,
    rationales: str = "auto",
    bootstrap: Mapping[str, Any] | None = None,
    seed_baseline: bool = False,
    backend: Mapping[str, Any] | None = None,
    rl: Mapping[str, Any] | None = None,
    objective: str = "auto",
    calibrate: float | None = None,
    isolate: bool | None = None,
    num_processes: int | None = None,
    accelerate_config: str | None = None,
    say: Callable[[str], None] = say_now,
) -> RunResult:
    """Train and evaluate a judge with TRACT: stage one, self-generation, stage two from the seed model, evaluation.

    If interrupted, call it again with the same arguments: it continues at the first unfinished step.

    Args:
        model: Seed model: directory or hub id. Both stages start from it.
        data: A .jsonl, .json, .csv or .parquet file, or a hub id; see `docs/data.md`.
        output_dir: Directory of this run. Use one directory per run.
        eval_data: Held-out items, a file or hub id. None: `eval_fraction` of the groups of `data` is held out.
        eval_fraction: Fraction of the groups to hold out. None: a tenth, but at least five groups if these are no more
            than a third of all groups. With fewer groups, the report cannot say how good the judge is.
        rubric: YAML file with `criterion` and `scores`, for rows with instructions and responses. See `columns.Rubric`.
        columns: Names of your columns, as `role=column` strings or a mapping role -> column. See `columns.ROLES`.
        training: Fields of TRACTConfig, used in both stages.
        model_args: Fields of TRL's ModelConfig: dtype, LoRA, quantisation.
        generation: Sampling settings for self-generation and judging: `temperature`, `top_p`, `repetition_penalty`,
            `max_new_tokens`, `seed`, `max_attempts`.
        num_generations: Number of rationales, and so of stage-two rows, per prompt.
        on_failure: What to do if no rationale of a row reaches the marker. See CoTSelfDistill.
        keep_annotated: Train stage two on annotated rationales as well as on self-written ones.
        rationales: `auto`: the seed model writes rationales for rows that have only scores; other rows keep theirs.
            `given`: train only on rows that have a rationale. `bootstrap`: write new rationales for all rows. `none`:
            train in one stage on prompts and scores only.
        bootstrap: Settings for writing rationales: arguments of CoTBootstrap. The seed model writes them unless `model`
            and `backend` (`name` and arguments of that backend, such as `{"name": "chat", "base_url": ...}`) are given.
        seed_baseline: Also judge the held-out items with the untrained seed model, and compare with it in the report.
            The seed model does not know the marker, so the marker is appended to its text. It puts little probability
            on the grid, so its scores are normalised by the grid mass.
        rl: Fields of REALConfig for a reinforcement learning stage on the judge's own errors. With `rationales="none"`,
            it is the only stage. None: no such stage.
        backend: Generation backend: `name` (`transformers` or `vllm`) and arguments of that backend, such as
            `batch_size`.
        objective: `auto`: derive the settings that `training`, `model_args` and `generation` do not give from rows,
            model and device, print them, and write them to `recipe.json`. See `docs/defaults.md`. `paper`: use the
            defaults of TRACTConfig.
        calibrate: Fraction of the rows to set aside for calibrating the judges' scores; 0 for none. None: with `auto` a
            tenth, or 30 rows if there are few; with `paper` none.
        isolate: Run each step in its own process. None: only on a GPU.
        num_processes: Number of processes for each step. None: one per visible accelerator, or one. The number of rows
            in an update stays the same.
        accelerate_config: Accelerate configuration file for training.
        say: Function that prints progress messages.
    """
    for name, given in {"model": model, "data": data, "eval_data": eval_data}.items():
        if given is not None and not isinstance(given, str | PathLike):
            raise TypeError(
                f"{name} is a {type(given).__name__}. A run continues from what is on disk: save it and give the path"
            )
    spec = RunSpec(
        fspath(model),
        fspath(data),
        eval_data=None if eval_data is None else fspath(eval_data),
        eval_fraction=eval_fraction,
        own=OwnColumns.to_train_on(columns, rubric),
        training=dict(training or {}),
        model_args=dict(model_args or {}),
        generation=dict(generation or {}),
        num_generations=num_generations,
        on_failure=on_failure,
        keep_annotated=keep_annotated,
        rationales=rationales,
        bootstrap=dict(bootstrap or {}),
        seed_baseline=seed_baseline,
        backend=dict(backend or {}),
        rl=None if rl is None else dict(rl),
        objective=objective,
        calibrate=calibrate,
    )
    launch = Launch.planned(num_processes, accelerate_config)
    return carry_out(spec, Path(output_dir), isolate=isolate, launch=launch, say=say)


def carry_out(
    spec: RunSpec, directory: Path, *, isolate: bool | None = None, launch: Launch, say: Callable[[str], None] = say_now
) -> RunResult:
    """What `run_tract` does, with its arguments checked and in one place."""
    if spec.backend.get("name") == "server":
        raise ValueError(
            "the server backend cannot be used in a run, whose models are trained only during the run. Use the backend "
            "vllm or transformers"
        )
    check_seed(spec.model)
    spec = spec.settled(say)
    titles = steps_of(spec)
    run = Run(directory, spec.settings(), isolate=isolate, launch=launch, total=len(titles), say=say)
    if launch.starts:
        say(f"Each step runs in {launch}" + ("" if "settings" in titles else f"; {launch.update(spec.training)}"))
    pipeline = _Pipeline(spec, directory, run, titles)
    pipeline.prepare()
    if spec.bootstraps:
        pipeline.bootstrap()
    if "settings" in titles:
        pipeline.derive()
        if launch.starts:
            say(f"    Training in {launch}: {launch.update(pipeline.chosen.training)}")
    pipeline.train_and_judge()
    result = pipeline.report()
    if changed := changed_settings(directory, spec.settings()):
        say(
            "    Warning: these inputs changed during the run, which started with the old ones: "
            f"{'; '.join(changed[:5])}"
        )
    return result


class _Pipeline:
    """A run under way: the files of its steps, and what they are made of."""

    def __init__(self, spec: RunSpec, directory: Path, run: Run, titles: Mapping[str, str]) -> None:
        self.spec, self.directory, self.run, self.titles, self.say = spec, directory, run, titles, run.say
        self.chosen = spec  # with what is derived
        self.recipe: dict[str, Any] | None = None
        self.given, self.held_out = directory / "train.jsonl", directory / "eval.jsonl"
        self.aside = directory / "calibration.jsonl"
        # What stage one trains on, and the steps that make it.
        self.rows, self.rows_of = self.given, ["prepare"]
        if spec.bootstraps:
            self.rows, self.rows_of = directory / "bootstrapped" / "rows.jsonl", ["bootstrap"]

    def step(self, name: str, work: Step | Callable[[], None], makes: Sequence[str], of: Sequence[str] = ()) -> None:
        self.run.step(name, self.titles[name], work, makes=makes, of=of)

    def prepare(self) -> None:
        self.step("prepare", self._read_rows, ["train.jsonl", "eval.jsonl", "calibration.jsonl", "*.numbers.json"])
        self.kept_aside = _count(self.aside) if self.aside.is_file() else 0
        aside = f", {self.kept_aside} items set aside for calibration" if self.kept_aside else ""
        self.say(f"    {_count(self.given)} training rows, {_count(self.held_out)} held-out items{aside}")

    def _read_rows(self) -> None:
        spec, say = self.spec, self.say
        template = spec.training.get("chat_template_path")
        chat = bool(tokenizer_to_train(spec.model, template, spec.revision).chat_template)
        data, evaluated = spec.source(spec.data, say), None
        groups: dict[bool, set[int]] = {True: set(), False: set()}  # held out, and not

        def judged(item: Item) -> Sequence[Row]:
            held_out = evaluated is not None or split(item)
            groups[held_out].add(hash(item.group))
            return [item.reference] if held_out else []

        if spec.eval_data is None:
            split = spec.split(data)
        else:
            split, evaluated = nothing_held_out, spec.source(spec.eval_data, say)
        calibrates = any(name.startswith("calibrate-") for name in self.titles)
        aside = spec.kept_aside(data, split, evaluated) if calibrates else nothing_held_out
        if isinstance(aside, str):
            say(f"    The judges are not calibrated: {aside}")
            aside = nothing_held_out
        elif calibrates:
            kept = data.rows(chat, lambda item: [item.reference] if aside(item) and not split(item) else [])
            write_rows(self.aside, kept)
        if spec.bootstraps:
            # Rows without completions among them: the bootstrap writes those.
            given = data.rows(chat, lambda item: [] if split(item) or aside(item) else spec.to_write(item))
        else:
            given = data.training_rows(chat, lambda item: not (split(item) or aside(item)))
        write_rows(self.given, given)
        write_rows(self.held_out, (evaluated or data).rows(chat, judged))
        if few := too_few_groups(len(groups[True]), len(groups[False])):
            say(f"    {few}")

    def bootstrap(self) -> None:
        spec, folder = self.spec, self.rows.parent
        author = spec.bootstrap.get("model")
        backend = spec.bootstrap.get("backend") or spec.backend
        step = BootstrapStep(
            spec.model,
            str(self.given),
            str(folder),
            spec.bootstrap_settings(),
            spec.backend_of_seed(backend) if author is None else dict(backend),
            author=author,
            chat_template=spec.training.get("chat_template_path"),
        )
        self.step("bootstrap", step, [folder.name], ["prepare"])
        if not _count(self.rows):
            raise ValueError(
                f"no row is left to train on, because the bootstrap accepted no rationale ({folder}/summary.json lists "
                "the reasons). In the bootstrap settings, choose another model or backend, or raise num_generations "
                "or tolerance. Or set rationales='none' to train without rationales"
            )

    def derive(self) -> None:
        file = self.directory / "recipe.json"
        self.step("settings", lambda: write_recipe(self.spec, JsonlRows(self.rows), file), [file.name], self.rows_of)
        self.recipe = recipe = read_json(file)
        self.chosen, self.rows_of = self.spec.with_recipe(recipe), [*self.rows_of, "settings"]
        self.say("    " + "\n    ".join(tell(recipe)))

    def train_and_judge(self) -> None:
        spec, chosen, titles = self.spec, self.chosen, self.titles
        if spec.stages:
            self.step("stage1", self._train(self.rows, "stage1", chosen.training), ["stage1"], self.rows_of)
            self.step("distill", self._distill(), ["self-generated"], [*self.rows_of, "stage1"])
            own_rows = self.directory / "self-generated" / "rows.jsonl"
            stage_two = self._train(own_rows, "tract", chosen.stage_two_training, self.directory / "stage1")
            self.step("stage2", stage_two, ["tract"], ["distill"])
        elif "stage2" in titles:
            self.step("stage2", self._train(self.rows, "tract", chosen.training), ["tract"], self.rows_of)
        if "judge-seed" in titles and "stage2" in titles:
            self._judge_untrained("tract", "stage2")
        if "judge-stage1" in titles:
            self._judge("stage1", "stage1")
        if "judge-tract" in titles:
            self._judge("stage2", "tract")
        if "rl" in titles:
            self.step("rl", self._reinforce(), ["real"], ["stage2" if spec.stages else "prepare"])
            if "judge-seed" in titles and "stage2" not in titles:
                self._judge_untrained("real", "rl")
            self._judge("rl", "real")

    def _train(self, rows: Path, name: str, training: Mapping[str, Any], asked_like: Path | None = None) -> TrainStep:
        return TrainStep(
            self.spec.model,
            str(rows),
            str(self.directory / name),
            training={**training, **self.chosen.judged_in_training},
            model_args=dict(self.chosen.model_args),
            asked_like=None if asked_like is None else str(asked_like),
            own=None if self.spec.own is None else self.spec.own.to_dict(),
            recipe=self.recipe,
        )

    def _distill(self) -> DistillStep:
        kept = ("num_generations", "on_failure", "keep_annotated")
        return DistillStep(
            str(self.directory / "stage1"),
            str(self.rows),
            str(self.directory / "self-generated"),
            {**self.chosen.generation, **{name: getattr(self.spec, name) for name in kept}},
            dict(self.spec.backend),
        )

    def _reinforce(self) -> RLStep:
        return RLStep(
            str(self.directory / "tract") if self.spec.stages else self.spec.model,
            str(self.given),
            str(self.directory / "real"),
            training=self.chosen.rl_training,
            model_args=dict(self.chosen.model_args),
            own=None if self.spec.own is None else self.spec.own.to_dict(),
        )

    def _judging(self, model: str, rows: Path, folder: str, **settings: Any) -> JudgeStep:
        settings = {**self.chosen.generation, **settings}
        if not self.spec.writes_rationales:
            settings = {name: value for name, value in settings.items() if name not in OF_RATIONALES}
        return JudgeStep(model, str(rows), str(self.directory / folder), settings, dict(self.spec.backend))

    def _judge(self, stage: str, name: str) -> None:
        model, before, step = self.directory / name, ["prepare", stage], f"calibrate-{name}"
        if step in self.titles and not self.kept_aside:
            self.run.leave_out(self.titles[step])
        elif step in self.titles:
            folder = f"calibration-{name}"
            raw = self._judging(str(model), self.aside, folder, recalibrate=False)
            self.step(step, raw, [folder], before)
            self.say(f"    {calibrate_judge(self.directory / folder, model)}")
            before = [*before, step]
        folder = f"judged-{name}"
        self.step(f"judge-{name}", self._judging(str(model), self.held_out, folder), [folder], before)

    def _judge_untrained(self, name: str, stage: str) -> None:
        settings = {"append_marker": True, "normalize_grid": True}
        step = self._judging(self.spec.model, self.held_out, "judged-seed", **settings)
        step.asked_like, step.backend = str(self.directory / name), self.spec.backend_of_seed(self.spec.backend)
        self.step("judge-seed", step, ["judged-seed"], ["prepare", stage])

    def report(self) -> RunResult:
        names = [name for name in self.titles if name.startswith("judge-")]
        found = {name: folder for name, folder in JUDGED.items() if f"judge-{folder.partition('-')[2]}" in names}
        judges = {name: Judged(self.directory / folder) for name, folder in found.items()}
        result = summarise(self.directory, judges, self.run.seconds)
        makes = ["report.json", "report*.html", "report*-plots/*"]
        self.step("report", lambda: self._write(result, judges), makes, names)
        return result

    def _write(self, result: RunResult, judges: Mapping[str, Judged]) -> None:
        directory = self.directory
        data, held_out = (without_secrets(each) for each in (self.spec.data, self.spec.eval_data or self.spec.data))
        write_report(directory, result, judges)
        for scale in judges[list(judges)[-1]].scales:
            on_scale = {name: judge.scales[scale] for name, judge in judges.items()}
            write_run_page(directory, on_scale, result.reports, self.say)
            reports = {name: result.reports[judge.called(name)] for name, judge in on_scale.items()}
            for name in (each for each in judges if each in MODELS):
                compared = dict(list(reports.items())[: list(reports).index(name) + 1])
                card = directory / MODELS[name] / "README.md"
                finish_card(directory, card, on_scale[name], compared, data=data, held_out=held_out)


def nothing_held_out(item: Item) -> bool:
    """Where evaluation rows are of their own, or none are kept aside."""
    return False


def _count(file: Path) -> int:
    with file.open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)
