"""Folders of judgements and runs -> the page about them. Knows where a run keeps things, nothing of HTML or models."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.evaluation.report import ScoreReport, compare
from trl_tract.files.journal import digest, read_jsonl
from trl_tract.page import JudgedItems, OtherJudge, write_page
from trl_tract.runs.steps import read_judgements
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.saved.model_card import add_evaluation, add_training_run

STAGES = {"stage one": "stage1", "stage two": "tract"}
"""What a run calls its stages, and the folders they train in."""

_INTERNAL = {"rows_digest", "block_size", "aspects"}


def item_groups(records: list[dict[str, Any]]) -> list[str]:
    """The group of each item; an item without one is a group of its own."""
    return [str(record.get("group", number)) for number, record in enumerate(records)]


def judged_items(
    directory: Path,
    report: ScoreReport,
    *,
    name: str | None = None,
    data: str | Path | None = None,
    others: Mapping[str, tuple[Path, ScoreReport]] | None = None,
    aspect: str | None = None,
) -> JudgedItems:
    """What a page needs to know of a folder of judgements, and of the run that it belongs to.

    Args:
        directory: Output directory of a JudgeStep. If it lies in a run, that run's learning curves are shown.
        report: Agreement of these judgements with their gold scores.
        name: What the judge is called; by default its model.
        data: JSONL of the rows that were judged, for their prompts; by default the run's held-out rows, if those were.
        others: Name -> folder and report of other judges of the same items.
        aspect: The one that is shown, where several were judged.

    Raises:
        ValueError: `data` holds other rows than those that were judged.
    """
    judgements = read_judgements(directory, aspect)
    settings = _settings(directory)
    called = name or str(settings.get("model", directory.name))
    return JudgedItems(
        name=called if aspect is None else f"{called}, {aspect}",
        records=judgements["records"],
        report=report,
        grid=_grid(settings, aspect),
        prompts=_prompts(directory, settings, data),
        settings={label: value for label, value in settings.items() if label not in _INTERNAL},
        others=[
            OtherJudge(other, its_report, _difference(judgements, folder, report, aspect))
            for other, (folder, its_report) in (others or {}).items()
        ],
        curves=_curves(directory.parent),
    )


def with_aspect(name: str, aspect: str | None) -> str:
    """What a judge is called in the report on one of its aspects."""
    return name if aspect is None else f"{name}, {aspect}"


def page_file(file: Path, aspect: str | None) -> Path:
    """Where the page of an aspect goes: `report.html`, `report-tone.html`."""
    return file if aspect is None else file.with_stem(f"{file.stem}-{re.sub(r'[^0-9A-Za-z]+', '-', aspect)}")


def write_run_page(
    directory: Path,
    judged: Mapping[str, str],
    reports: Mapping[str, ScoreReport],
    say: Callable[[str], None],
    aspect: str | None = None,
) -> None:
    """Write `report.html` of a run: its last judge, compared with the others; without matplotlib, say what is missing.

    Args:
        directory: The run's.
        judged: Judge -> its folder of judgements.
        reports: Judge -> agreement with the gold scores.
        say: Prints where the page is.
        aspect: The one that the page is about, where several were judged.
    """
    *others, main = judged
    items = judged_items(
        directory / judged[main],
        reports[with_aspect(main, aspect)],
        name=main,
        others={name: (directory / judged[name], reports[with_aspect(name, aspect)]) for name in others},
        aspect=aspect,
    )
    try:
        page, *pictures = write_page(items, page_file(directory / "report.html", aspect))
    except ImportError as error:
        say(f"    no report page: {error}")
    else:
        say(f"    {page} and {len(pictures)} pictures in {page.stem}-plots")


def finish_card(
    run: Path,
    report: ScoreReport,
    *,
    data: str,
    held_out: str,
    grid_mass: float | None,
    errors: Mapping[str, int],
    aspect: str | None = None,
) -> None:
    """Tell the TRACT model's card what training could not know: the evaluation, where rows came from, stage one.

    Args:
        run: The run's folder.
        report: Agreement of the TRACT model with the gold scores.
        data: File or hub id of the annotated rows.
        held_out: File or hub id of the items that were judged.
        grid_mass: Mean probability on the grid.
        errors: Why items have no score, and how many for each reason.
        aspect: The one that the report is about, where several were judged: called for each of them in turn.
    """
    card, summary = run / "tract" / "README.md", run / "self-generated" / "summary.json"
    add_training_run(
        card, run / "stage1" / "README.md", data=data, summary=json.loads(summary.read_text(encoding="utf-8"))
    )
    on_disk = Path(held_out).exists()
    settings = _settings(run / "judged-tract")
    sampling = ", ".join(f"`{name}` {value}" for name, value in settings.items() if name not in _INTERNAL | {"model"})
    add_evaluation(
        card,
        report,
        dataset_name=Path(held_out).name if on_disk else held_out,
        dataset_type=None if on_disk else held_out,
        grid_mass=grid_mass,
        errors=errors,
        notes=[f"Judged with {sampling}"] if sampling else [],
        aspect=aspect,
    )


def recalibrate(directory: Path, model: str | None = None) -> tuple[Recalibration, Path]:
    """Fit a recalibration on the judgements in `directory` and save it with the judge.

    Args:
        directory: Of `trl-tract judge`, on held-out items with gold scores.
        model: The judge's directory; None: the one that judged.

    Returns:
        The fit, and the file that it is saved in.

    Raises:
        FileNotFoundError: No judgements there, or no judge to save it with.
        ValueError: The judgements were recalibrated already, have no gold scores, or are too few.
    """
    settings = _settings(directory)
    if settings.get("recalibrate"):
        raise ValueError(f"the judgements in {directory} are recalibrated already: judge again without --recalibrate")
    judgements = read_judgements(directory)
    known = np.isfinite(judgements["reference"])
    if not known.all():
        raise ValueError(
            f"{(~known).sum()} of {len(known)} judgements in {directory} have no gold score: judge rows that have one"
        )
    judge = Path(model or settings.get("model", ""))
    if not (model or settings.get("model")) or not judge.is_dir():
        raise FileNotFoundError(
            f"the judge {judge} is no directory on this disk, so nothing can be saved with it: name one with --model"
        )
    grid = judged_grid(directory) or JudgeConfig.load(judge).scales[0].grid.values
    groups = item_groups(judgements["records"])
    fitted = Recalibration.fit(judgements["score"], judgements["reference"], grid, groups=groups)
    return fitted, fitted.save(judge)


def judged_grid(directory: Path, aspect: str | None = None) -> tuple[float, ...] | None:
    """The grid that the judgements in `directory`, or those of an aspect, were made on; None where it is not known."""
    return _grid(_settings(directory), aspect)


def _settings(directory: Path) -> dict[str, Any]:
    file = directory / "settings.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _grid(settings: Mapping[str, Any], aspect: str | None = None) -> tuple[float, ...] | None:
    """The grid that was judged on, where it is written down on this disk; no hub is asked for it."""
    if aspect is not None:
        aspects = settings.get("aspects") or {}
        return tuple(float(value) for value in aspects[aspect]["values"]) if aspect in aspects else None
    if values := settings.get("score_values"):
        return tuple(float(value) for value in (values.values() if isinstance(values, Mapping) else values))
    model = settings.get("model")
    if model is None or not Path(model).is_dir():
        return None
    try:
        return JudgeConfig.load(model).scales[0].grid.values
    except FileNotFoundError:
        return None


def _prompts(directory: Path, settings: Mapping[str, Any], data: str | Path | None) -> list[Any] | None:
    # Of a run, the items that were held out; of `trl-tract judge`, the rows that it converted.
    beside = (directory.parent / "eval.jsonl", directory / "rows.jsonl")
    found = Path(data) if data is not None else next((file for file in beside if file.is_file()), None)
    if found is None:
        return None
    rows = list(read_jsonl(found))
    if settings.get("rows_digest") == digest(rows):
        return [row["prompt"] for row in rows]
    if data is None:
        return None
    raise ValueError(f"{found} does not hold the rows that were judged in {directory}: give the file that `judge` read")


def _difference(judgements: Mapping[str, Any], other: Path, report: ScoreReport, aspect: str | None) -> Any:
    theirs = read_judgements(other, aspect)
    return compare(
        judgements["score"],
        theirs["score"],
        judgements["reference"],
        groups=item_groups(judgements["records"]),
        n_bootstrap=report.n_bootstrap,
        seed=report.seed,
        grid=judged_grid(other, aspect),
    )


def _curves(run: Path) -> dict[str, list[dict[str, Any]]]:
    states = {stage: run / folder / "trainer_state.json" for stage, folder in STAGES.items()}
    return {
        stage: json.loads(file.read_text(encoding="utf-8"))["log_history"]
        for stage, file in states.items()
        if file.is_file()
    }
