"""The steps that a run has, in their order, and what they are called. Knows nothing of how they are done."""

from collections.abc import Mapping

from trl_tract.runs.spec import RunSpec

STEPS: Mapping[str, str] = {
    "prepare": "Reading the rows",
    "settings": "Deriving settings from rows, model and device",
    "stage1": "Stage one: the seed model on the annotated rationales",
    "distill": "Self-generation: the stage-one model writes its own rationales",
    "stage2": "Stage two: the seed model again, on those rationales",
    "judge-seed": "Judging the held-out items with the untrained seed model",
    "calibrate-stage1": "Judging the items set aside, to calibrate the stage-one model",
    "judge-stage1": "Judging the held-out items with the stage-one model",
    "calibrate-tract": "Judging the items set aside, to calibrate the TRACT model",
    "judge-tract": "Judging the held-out items with the TRACT model",
    "report": "Writing the report",
}
"""The steps of a run in their order, and what they are called."""
BOOTSTRAP = {"bootstrap": "Bootstrap: writing rationales for rows that have only scores"}
"""The step behind `prepare` where rows lack rationales."""
ONE_STAGE: Mapping[str, str] = {
    "prepare": STEPS["prepare"],
    "settings": STEPS["settings"],
    "stage2": "Training: the seed model on prompts and scores (no rationales, so no second stage)",
    "judge-seed": STEPS["judge-seed"],
    "calibrate-tract": "Judging the items set aside, to calibrate the judge",
    "judge-tract": "Judging the held-out items",
    "report": STEPS["report"],
}
"""The same without rationales."""
RL_STEPS: Mapping[str, str] = {
    "rl": "Reinforcement learning: training the judge on its own errors",
    "calibrate-real": "Judging the items set aside, to calibrate the judge after reinforcement learning",
    "judge-real": "Judging the held-out items with the judge after reinforcement learning",
}
"""What is added before the report where the judge is trained further on its own errors."""


def steps_of(spec: RunSpec) -> Mapping[str, str]:
    """The steps that a run will have, and what they are called."""
    if spec.rl is not None and not spec.stages:
        steps = {"prepare": STEPS["prepare"], "judge-seed": STEPS["judge-seed"]}
    elif not spec.stages:
        steps = dict(ONE_STAGE)
    elif spec.bootstraps:
        first, *others = STEPS.items()
        steps = dict([first, *BOOTSTRAP.items(), *others])
    else:
        steps = dict(STEPS)
    if spec.rl is not None:
        steps.pop("report", None)
        steps |= {**RL_STEPS, "report": STEPS["report"]}
    calibrates = spec.objective == "auto" if spec.calibrate is None else spec.calibrate > 0
    left_out = [] if spec.seed_baseline else ["judge-seed"]
    left_out += [] if calibrates else [name for name in steps if name.startswith("calibrate-")]
    left_out += [] if spec.objective == "auto" else ["settings"]
    return {name: title for name, title in steps.items() if name not in left_out}
