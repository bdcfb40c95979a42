"""Judgements and runs -> pages, cards and recalibrations. Knows where a run keeps things, nothing of HTML or models."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trl_tract.evaluation.recalibration import FILE_NAME as CALIBRATION_FILE
from trl_tract.evaluation.recalibration import Recalibration, applied_by_default
from trl_tract.evaluation.report import ScoreReport
from trl_tract.files.journal import digest, read_json, write_json
from trl_tract.page import JudgedItems, OtherJudge, write_page
from trl_tract.runs.judged import Judged, JudgedScale, Lazy
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.saved.model_card import add_evaluation, add_training_run

STAGES = {"stage one": "stage1", "stage two": "tract", "reinforcement": "real"}
"""What a run calls its stages, and the folders they train in."""
JUDGED = {
    **{"seed model": "judged-seed", "stage one": "judged-stage1"},
    **{"TRACT": "judged-tract", "REAL": "judged-real"},
}
"""The judges that a run may have, the one that is compared with the others last, and their folders of judgements."""
MODELS = {"TRACT": "tract", "REAL": "real"}
"""Those whose cards tell of the evaluation, and their folders."""
LEAST_SPREAD = 0.15
"""Of a run's calibrated scores, in parts of the gold scores': a constant ranks nothing."""


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        model: Directory of the final model.
        reports: Judge name -> agreement with the gold scores of the held-out items. With several aspects, one entry for
            each, such as `TRACT, tone`; likewise in the next two.
        grid_mass: Judge name -> mean probability mass on the grid; None if no item has a score.
        errors: Judge name -> reason for a missing score -> number of items, most common first.
        seconds: Step name -> duration in seconds.
    """

    model: Path
    reports: dict[str, ScoreReport]
    grid_mass: dict[str, float | None]
    errors: dict[str, dict[str, int]]
    seconds: dict[str, float]


def judged_items(
    judged: JudgedScale,
    report: ScoreReport,
    *,
    name: str | None = None,
    data: str | Path | None = None,
    others: Mapping[str, tuple[JudgedScale, ScoreReport]] | None = None,
) -> JudgedItems:
    """What a page needs to know of judgements, and of the run that they belong to.

    Args:
        judged: The judgements. If their folder lies in a run, that run's learning curves are shown.
        report: Their agreement with the gold scores.
        name: What the judge is called; by default its model.
        data: JSONL of the rows that were judged, for their prompts; by default the run's held-out rows, if those were.
        others: Name -> judgements and report of other judges of the same items.

    Raises:
        ValueError: `data` holds other rows than those that were judged.
    """
    folder = judged.folder
    prompts = folder.prompts(data)
    return JudgedItems(
        name=judged.called(name or str(folder.settings.get("model", folder.directory.name))),
        records=judged.records,
        report=report,
        grid=judged.grid,
        prompts=None if prompts is None else Lazy(prompts, judged.items.tolist()),
        about=_about(folder, data),
        settings=folder.shown_settings,
        others=[
            OtherJudge(other, its_report, judged.minus(its, n_bootstrap=report.n_bootstrap))
            for other, (its, its_report) in (others or {}).items()
        ],
        curves=_curves(folder.directory.parent),
    )


def page_file(file: Path, aspect: str) -> Path:
    """Where the page of an aspect goes: `report.html`, `report-tone.html`.

    A name that is more than small letters and digits also has its fingerprint there, so that no two share a file, on
    file systems that take small and capital letters for the same either.
    """
    if not aspect:
        return file
    plain = re.sub(r"[^0-9a-z_]+", "-", aspect.lower())
    suffix = plain if plain == aspect and "-" not in plain else f"{plain[:40]}-{digest([aspect])[:8]}"
    return file.with_stem(f"{file.stem}-{suffix}")


def write_run_page(
    directory: Path, judges: Mapping[str, JudgedScale], reports: Mapping[str, ScoreReport], say: Callable[[str], None]
) -> None:
    """Write `report.html` of a run: its last judge, compared with the others; without matplotlib say so."""
    *others, (main, judged) = judges.items()
    items = judged_items(
        judged,
        reports[judged.called(main)],
        name=main,
        others={name: (its, reports[its.called(name)]) for name, its in others},
    )
    try:
        page, *pictures = write_page(items, page_file(directory / "report.html", judged.name))
    except ImportError as error:
        say(f"    no HTML report: {error}")
    else:
        say(f"    {page} and {len(pictures)} charts in {page.stem}-plots")


def finish_card(
    run: Path, card: Path, judged: JudgedScale, reports: Mapping[str, ScoreReport], *, data: str, held_out: str
) -> None:
    """Tell a model's card what training could not know: the evaluation; of TRACT, where rows came from, stage one.

    Args:
        reports: Agreement with the gold scores: of the judges that are compared with it, and of its own, last.
        data: File or hub id of the annotated rows.
        held_out: File or hub id of the items that were judged.
    """
    summary = run / "self-generated" / "summary.json"
    if summary.is_file() and card.parent.name == STAGES["stage two"]:
        add_training_run(card, run / "stage1" / "README.md", data=data, summary=read_json(summary))
    on_disk = Path(held_out).exists()
    settings = {name: value for name, value in judged.folder.shown_settings.items() if name != "model"}
    sampling = ", ".join(f"{name} {value}" for name, value in settings.items())
    *_, report = reports.values()
    add_evaluation(
        card,
        report,
        others={name: other for name, other in reports.items() if name == "seed model"},
        dataset_name=Path(held_out).name if on_disk else held_out,
        dataset_type=None if on_disk else held_out,
        grid_mass=judged.mean_grid_mass,
        errors=judged.errors,
        notes=[f"Judged with {sampling}"] if sampling else [],
        aspect=judged.name or None,
        writes_rationale=JudgeConfig.load(card.parent).writes_rationale,
    )


def recalibrate(
    directory: Path, model: str | None = None, *, always: bool = False, least_spread: float = 0.0
) -> tuple[dict[str, Recalibration], Path]:
    """Fit a recalibration on the judgements in `directory` and save it with the judge.

    Args:
        model: The judge's directory; None: the one that judged.
        always: Whether the judge is to apply it where nothing else is said; so it does, too, in place of one that it
            applies by default.

    Returns:
        The fit of each scale by its name, and the file that they are saved in.

    Raises:
        FileNotFoundError: No judgements there, or no judge to save it with.
        ValueError: The judgements were recalibrated already, lack gold scores, or are too few.
    """
    folder = Judged(directory)
    if folder.settings.get("recalibrate"):
        raise ValueError(
            f"the judgements in {directory} are already recalibrated. Judge again with --recalibrate false"
        )
    for judged in folder.scales.values():
        if without := len(folder) - len(judged.items):
            which = f" for aspect {judged.name!r}" if judged.name else ""
            raise ValueError(
                f"{without} of {len(folder)} judgements in {directory} have no gold score{which}. Judge rows that have "
                "gold scores"
            )
    judge = Path(model or folder.settings.get("model", ""))
    if not (model or folder.settings.get("model")) or not judge.is_dir():
        raise FileNotFoundError(
            f"the judge {judge} is not a local directory, so nothing can be saved there. Give a local copy with --model"
        )
    grids = {scale.name: scale.grid.values for scale in JudgeConfig.load(judge).scales}
    fitted = {
        name: Recalibration.fit(
            judged.score, judged.reference, judged.grid or grids[name], groups=judged.groups, least_spread=least_spread
        )
        for name, judged in folder.scales.items()
    }
    always = always or applied_by_default(judge)
    files = [one.save(judge, scale=name, always=always) for name, one in fitted.items()]
    return fitted, files[0]


def calibrate_judge(directory: Path, model: Path) -> str:
    """Fit a recalibration on a run's own judgements, and let the judge apply it from now on, if that lowers its error.

    One that is there already stays: training begins without any, so it is of this judge, and may be the user's own.

    Returns:
        What became of it, in a sentence.
    """
    file = model / CALIBRATION_FILE
    if file.is_file():
        return f"Calibrated before: {file} is kept"
    try:
        fits, _ = recalibrate(directory, str(model), always=True, least_spread=LEAST_SPREAD)
    except ValueError as error:
        return f"not calibrated: {error}"
    worse = {name: fit for name, fit in fits.items() if fit.rmse_cross_validated >= fit.rmse}
    not_applied = f"Not applied, because it does not lower the cross-validated error: {_told(worse)}"
    if len(worse) == len(fits):
        file.unlink()
        return not_applied
    for name, fit in worse.items():
        replace(fit, slope=1.0, intercept=0.0, rmse_cross_validated=fit.rmse).save(model, scale=name, always=True)
    calibrated = f"Calibrated: {_told({name: fit for name, fit in fits.items() if name not in worse})}"
    return f"{calibrated}. {not_applied}" if worse else calibrated


def _told(fits: Mapping[str, Recalibration]) -> str:
    return "; ".join(
        f"{f'{name}: ' if name else ''}score -> {fit.slope:.2f} * score {'-' if fit.intercept < 0 else '+'} "
        f"{abs(fit.intercept):.2f}, RMSE on {fit.n} items {fit.rmse:.3f} before, {fit.rmse_cross_validated:.3f} after"
        for name, fit in fits.items()
    )


def _about(folder: Judged, data: str | Path | None) -> dict[str, str]:
    """What is judged with what: the model that training started from, the rows, the day. Of a path its name alone."""
    run, model = _json(folder.directory.parent / "settings.json"), Path(folder.settings.get("model", ""))
    base = _json(model / "adapter_config.json").get("base_model_name_or_path") or run.get("model")
    known = {"Base model": base, "Rows": data or run.get("eval_data") or run.get("data")}
    about = {label: Path(name).name if Path(name).exists() else str(name) for label, name in known.items() if name}
    day = datetime.fromtimestamp(folder.rows.path.stat().st_mtime, tz=UTC).date()
    return {**about, "Judged": day.isoformat()}


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _curves(run: Path) -> dict[str, list[dict[str, Any]]]:
    states = {stage: run / folder / "trainer_state.json" for stage, folder in STAGES.items()}
    return {stage: read_json(file)["log_history"] for stage, file in states.items() if file.is_file()}


def summarise(directory: Path, judges: Mapping[str, Judged], seconds: dict[str, float]) -> RunResult:
    """Agreement of each judge with the gold scores, by aspect."""
    scales = {scale.called(name): scale for name, judge in judges.items() for scale in judge.scales.values()}
    return RunResult(
        directory / MODELS[list(judges)[-1]],
        {name: scale.report() for name, scale in scales.items()},
        {name: scale.mean_grid_mass for name, scale in scales.items()},
        {name: scale.errors for name, scale in scales.items()},
        seconds,
    )


def write_report(directory: Path, result: RunResult, judges: Mapping[str, Judged]) -> None:
    """Write `report.json`: every judge's figures, and what they were made of."""
    content = {
        "judges": {
            name: {**report.to_dict(), "grid_mass": result.grid_mass[name], "errors": result.errors[name]}
            for name, report in result.reports.items()
        },
        "made_of": {name: judge.made_of for name, judge in judges.items()},
        "seconds": result.seconds,
    }
    write_json(directory / "report.json", content)


def judged_folders(folder: str) -> list[str]:
    """The folders of judgements of a run, that of the judge it ends with first; any other folder by itself."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such directory")
    if (Path(folder) / "judgements.jsonl").is_file():
        return [folder]
    found = [Path(folder) / name for name in reversed(JUDGED.values())]
    return [str(each) for each in found if (each / "judgements.jsonl").is_file()] or [folder]
