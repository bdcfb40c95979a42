"""`trl-tract report`, and what other commands print of judgements. Heavy imports wait until they are needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_tract.commands.looking import RecalibrateArguments, ReportArguments

if TYPE_CHECKING:
    from trl_tract.evaluation.report import ScoreReport
    from trl_tract.runs.judged import JudgedScale


def report(args: ReportArguments) -> int:
    """Do what the options of `report` say; the exit code."""
    from trl_tract.runs.judged import Judged
    from trl_tract.runs.results import judged_folders
    from trl_tract.sources.preferences import pair_report

    # A YAML file may name a single directory without making it a list.
    given = [args.judgements] if isinstance(args.judgements, str) else args.judgements
    if len(given) > 2:
        raise ValueError(f"{len(given)} directories were given. Give one for a report, or two for a comparison")
    of_runs = [judged_folders(folder) for folder in given]
    # Of one run both judges; of two, the judge that each ends with.
    folders = of_runs[0] if len(given) == 1 else [folders[0] for folders in of_runs]
    judged = [(folder, Judged(folder)) for folder in folders]
    if any(each.holds_pairs for _, each in judged):
        for folder, each in judged:
            print(f"{folder}\n{pair_report(each.sides, n_bootstrap=args.n_bootstrap)}\n")
        if args.html:
            raise ValueError("--html: pairs have no gold scores, which the HTML report needs. Leave it out")
        return 0
    first, last = judged[0][1], judged[-1][1]
    if first.scales.keys() != last.scales.keys():
        names = [", ".join(name or "one score" for name in each.scales) for each in (first, last)]
        raise ValueError(
            f"{folders[0]} holds judgements of {names[0]}, but {folders[-1]} of {names[1]}. Give two directories with "
            "the same kind of judgements"
        )
    for name in first.scales:
        _report_scale(args, [(folder, each.scales[name]) for folder, each in judged])
    return 0


def _report_scale(args: ReportArguments, judged: Sequence[tuple[str, "JudgedScale"]]) -> None:
    """Report on the scores on one scale, of one judge or of two."""
    from trl_tract.runs.judged import check_same_items
    from trl_tract.runs.results import judged_items, page_file
    from trl_tract.scale.grid import ScoreGrid

    (folder, main), *others = judged
    for other, scale in others:
        check_same_items(main, scale, (folder, other))
    grid = ScoreGrid.from_values(args.score_values).values if args.score_values else main.grid
    reports = [scale.report(n_bootstrap=args.n_bootstrap, grid=grid) for _, scale in judged]
    for (name, scale), report in zip(judged, reports, strict=True):
        print_report(name, scale, report)
    for other, scale in others:
        print(f"a: {main.called(folder)}, b: {scale.called(other)}")
        print(main.minus(scale, n_bootstrap=args.n_bootstrap, grid=grid))
    if args.html:
        from trl_tract.page import write_page

        compared = {other: (scale, report) for (other, scale), report in zip(others, reports[1:], strict=True)}
        items = judged_items(main, reports[0], data=args.data, others=compared)
        page, *pictures = write_page(items, page_file(Path(args.html), main.name))
        print(f"The HTML report is {page}. Its {len(pictures)} charts are in {page.stem}-plots beside it")


def print_report(name: str, scale: "JudgedScale", report: "ScoreReport") -> None:
    """Print one judge's agreement with the gold scores on one scale."""
    mass = scale.mean_grid_mass
    print(f"{scale.called(name)} (grid mass {'unknown' if mass is None else f'{mass:.3f}'})\n{report}")
    if without := len(scale.folder) - len(scale.items):
        print(f"{without} items have no gold score and are not part of the report")
    print_errors(scale.errors)
    print()


def print_judged(name: str, folder: str) -> None:
    """Print what `trl-tract judge` ends with: agreement where gold scores are known, and where the judgements are."""
    from trl_tract.runs.judged import Judged
    from trl_tract.sources.preferences import pair_report

    judged = Judged(folder)
    if judged.holds_pairs:
        print(pair_report(judged.sides))
    else:
        for scale in judged.scales.values():
            if len(scale.items):
                print_report(name, scale, scale.report())
            else:
                print_scores(name, scale)
    unit = "response" if judged.holds_pairs else "row"
    print(f"The judgements are in {judged.rows.path}, one line per {unit}, in the order of the input")


def print_scores(name: str, scale: "JudgedScale") -> None:
    """Print what came out where there are no gold scores to compare with."""
    scores = [score for score in scale.score.tolist() if score == score]
    line = f"{scale.called(name)}: {len(scores):,} of {len(scale.score):,} rows have a score"
    if scores:
        line += f", from {min(scores):.2f} to {max(scores):.2f}, mean {sum(scores) / len(scores):.2f}"
        line += f", grid mass {scale.mean_grid_mass:.3f}"
    print(line)
    print_errors(scale.errors)


def print_errors(errors: Mapping[str, int]) -> None:
    """Print why items have no score."""
    for reason, count in errors.items():
        print(f"no score for {count} item(s): {reason}")


def recalibrate(args: RecalibrateArguments) -> int:
    """Fit a line to judgements of held-out items, say what it changes, and save it beside the judge."""
    from trl_tract.runs import results

    fits, file = results.recalibrate(Path(args.judgements), args.model)
    for name, fitted in fits.items():
        print(
            f"{f'{name}: ' if name else ''}score -> {fitted.slope:.3f} * score {'-' if fitted.intercept < 0 else '+'} "
            f"{abs(fitted.intercept):.3f}, kept in {fitted.low:g} to {fitted.high:g}; fitted on {fitted.n} held-out "
            f"judgements\nRMSE {fitted.rmse:.3f} as judged, {fitted.rmse_cross_validated:.3f} recalibrated "
            "(cross-validated)"
        )
        if fitted.rmse_cross_validated >= fitted.rmse:
            print("In cross-validation, it does not lower the error on new items. It is better not to use it")
    print(f"Saved to {file}. It is applied only by trl-tract judge --recalibrate")
    return 0
