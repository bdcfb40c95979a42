"""The rows of the paper's main table and ablations, and rivals: which models each needs, how its score is decided.

Knows nothing of files, tables or seeds. `docs/baselines.md` says the same in prose.
"""

from dataclasses import dataclass
from typing import Any, Literal

Decision = Literal["mean", "sampled"]


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
        objective: Fields of TRACTConfig on top of the configuration's own.
        writer: The model that wrote the rationales it is trained on; None: the annotated ones; `BOOTSTRAPPED`: the
            seed model did, for prompts and scores alone.
        start: The model it starts from; None is the seed model.
        samples: Rationales that the writer wrote for each prompt.
        keep: Which of the writer's several are trained on: `all`; the `nearest` to the gold score by its own expected
            score; as many as there are prompts, drawn with a `weight` that falls with that distance.
        keep_annotated: Whether the annotated rationales are trained on as well.
        reinforced: Whether it goes on from `start` by REALTrainer.
    """

    objective: dict[str, Any]
    writer: str | None = None
    start: str | None = None
    samples: int = 1
    keep: Literal["all", "nearest", "weighted"] = "all"
    keep_annotated: bool = False
    reinforced: bool = False


@dataclass(frozen=True)
class TableRow:
    """A line of the table: a model, and how its score distribution becomes a score."""

    label: str
    model: str
    decision: Decision = "mean"
    pearson: str = ""
    """Average over the paper's four benchmarks, Mistral-7B-Instruct-v0.2."""


CROSS_ENTROPY = {"raft_weight": 0.0, "score_in_ce": True}
SEED = "seed"
"""The seed model itself: nothing is trained, and the marker is put behind whatever it writes."""
BOOTSTRAPPED = "bootstrap"
RIVALS = ("mean", "ridge")
"""What takes no language model to train; see `rivals.py`."""

MODELS: dict[str, Model] = {
    "ce-direct": Model({**CROSS_ENTROPY, "drop_rationale": True}),
    "raft-direct": Model({"rationale_weight": 0.0, "drop_rationale": True}),
    "ce": Model(CROSS_ENTROPY),
    "stage1": Model({}),
    "tract": Model({}, writer="stage1"),
    "continued": Model({}, writer="stage1", start="stage1"),
    "ce-self": Model(CROSS_ENTROPY, writer="ce"),
    "mixed": Model({}, writer="stage1", keep_annotated=True),
    "tract-nearest": Model({}, writer="stage1", keep="nearest"),
    "tract-weighted": Model({}, writer="stage1", keep="weighted"),
    "tract-3": Model({}, writer="stage1", samples=3),
    "stage1-bootstrap": Model({}, writer=BOOTSTRAPPED),
    "tract-bootstrap": Model({}, writer="stage1-bootstrap"),
    "real": Model({}, start="tract", reinforced=True),
}

TABLE: dict[str, TableRow] = {
    "mean": TableRow("mean of the training scores", "mean"),
    "seed": TableRow("seed model, CoT-RAIL", SEED),
    "ridge": TableRow("ridge on the seed model's hidden state", "ridge"),
    "ce-direct": TableRow("CE, no rationale, sampled score", "ce-direct", "sampled", ".488"),
    "ce-direct-rail": TableRow("CE, no rationale, RAIL", "ce-direct"),
    "raft-direct": TableRow("RAFT, no rationale", "raft-direct", pearson=".623"),
    "ce": TableRow("CE, rationale, sampled score", "ce", "sampled", ".557"),
    "ce-rail": TableRow("CE, rationale, CoT-RAIL", "ce"),
    "ce-self": TableRow("CE on self-written rationales, CoT-RAIL", "ce-self", pearson=".617"),
    "stage1": TableRow("stage one alone, CoT-RAIL", "stage1", pearson=".556"),
    "stage1-sampled": TableRow("stage one alone, sampled score", "stage1", "sampled"),
    "mixed": TableRow("stage two on annotated and self-written rationales", "mixed", pearson=".592"),
    "continued": TableRow("stage two continued from stage one", "continued", pearson=".515"),
    "tract-nearest": TableRow("TRACT, the rationale nearest to the gold score", "tract-nearest"),
    "tract-weighted": TableRow("TRACT, rationales weighted by their nearness", "tract-weighted"),
    "tract-bootstrap": TableRow("TRACT, bootstrapped in place of annotated rationales", "tract-bootstrap"),
    "tract-3": TableRow("TRACT, 3 rationales a prompt", "tract-3"),
    "real": TableRow("TRACT, then REAL", "real"),
    "tract-sampled": TableRow("TRACT, sampled score", "tract", "sampled", ".572"),
    "tract": TableRow("TRACT, CoT-RAIL", "tract", pearson=".650"),
}
"""In the order of the table; the last is what the others are compared with."""


def models_for(rows: list[str]) -> list[str]:
    """The models that table rows need, those that others start or learn from included, in an order that works.

    Raises:
        ValueError: A row is unknown.
    """
    unknown = [row for row in rows if row not in TABLE]
    if unknown:
        raise ValueError(f"rows: {', '.join(unknown)} unknown. Known are: {', '.join(TABLE)}")
    needed: set[str] = set()
    open_models = [TABLE[row].model for row in rows]
    while open_models:
        name = open_models.pop()
        if name not in MODELS or name in needed:
            continue
        needed.add(name)
        open_models += [source for source in (MODELS[name].writer, MODELS[name].start) if source]
    return [name for name in MODELS if name in needed]


def judges_for(rows: list[str]) -> list[str]:
    """The models that judge the tests for table rows, in the order of the table."""
    return list(dict.fromkeys(TABLE[row].model for row in TABLE if row in rows and TABLE[row].model not in RIVALS))
