"""The rows of the paper's main table and ablations: which models each needs, and how its score is decided.

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
        rows: What it is trained on: the annotated rationales, or those that another model wrote.
        start: The model it starts from; None is the seed model.
    """

    objective: dict[str, Any]
    rows: str = "annotated"
    start: str | None = None


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

MODELS: dict[str, Model] = {
    "ce-direct": Model({**CROSS_ENTROPY, "drop_rationale": True}),
    "raft-direct": Model({"rationale_weight": 0.0, "drop_rationale": True}),
    "ce": Model(CROSS_ENTROPY),
    "stage1": Model({}),
    "tract": Model({}, rows="stage1"),
    "continued": Model({}, rows="stage1", start="stage1"),
    "ce-self": Model(CROSS_ENTROPY, rows="ce"),
    "mixed": Model({}, rows="stage1+annotated"),
}

TABLE: dict[str, TableRow] = {
    "seed": TableRow("seed model, CoT-RAIL", SEED),
    "ce-direct": TableRow("CE, no rationale, sampled score", "ce-direct", "sampled", ".488"),
    "ce-direct-rail": TableRow("CE, no rationale, RAIL", "ce-direct"),
    "raft-direct": TableRow("RAFT, no rationale", "raft-direct", pearson=".623"),
    "ce": TableRow("CE, rationale, sampled score", "ce", "sampled", ".557"),
    "ce-rail": TableRow("CE, rationale, CoT-RAIL", "ce", pearson=".562"),
    "ce-self": TableRow("CE on self-written rationales, CoT-RAIL", "ce-self", pearson=".617"),
    "stage1": TableRow("stage one alone, CoT-RAIL", "stage1", pearson=".556"),
    "mixed": TableRow("stage two on annotated and self-written rationales", "mixed", pearson=".592"),
    "continued": TableRow("stage two continued from stage one", "continued", pearson=".515"),
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
        if name == SEED or name in needed:
            continue
        needed.add(name)
        model = MODELS[name]
        open_models += [source for source in (writer(name), model.start) if source]
    return [name for name in MODELS if name in needed]


def writer(model: str) -> str | None:
    """The model whose rationales `model` is trained on; None for the annotated ones."""
    source = MODELS[model].rows.removesuffix("+annotated")
    return None if source == "annotated" else source
