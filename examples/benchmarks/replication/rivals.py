"""What a trained judge has to beat: the mean of the training scores, and a regression on the frozen seed model.

The features are the last hidden state of the seed model behind the prompt and the marker, where its score would come
next: what its head is given there, by the forward pass that judges.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trl_tract.backends import TransformersBackend
from trl_tract.backends.base import reusing
from trl_tract.evaluation.pairs import Floats
from trl_tract.files.journal import digest, read_jsonl
from trl_tract.rows.golds import read_golds
from trl_tract.rows.row import Row
from trl_tract.rows.template import Template
from trl_tract.rows.tokens import prefix_ids, resolve_asked
from trl_tract.scale.scale import Scale


def predict(
    name: str, features: Floats, gold: Floats, wanted: Floats, *, alpha: float = 1.0, ends: tuple[float, float]
) -> Floats:
    """Scores of items.

    Args:
        name: `mean` or `ridge`.
        features: Of the training items, `(n, H)`.
        gold: Their gold scores, `(n,)`, rubric units.
        wanted: Features of the items to be scored, `(m, H)`.
        alpha: Penalty of the regression on standardised features.
        ends: The score range: what the regression predicts beyond it is its end.

    Returns:
        `(m,)`, rubric units.
    """
    model = DummyRegressor() if name == "mean" else make_pipeline(StandardScaler(), Ridge(alpha=alpha))
    return np.clip(model.fit(features, gold).predict(wanted), *ends)


def read_golds_of(file: Path, scales: tuple[Scale, ...]) -> Floats:
    """The gold score of each row of a file, `(n,)`, rubric units."""
    return np.array([np.mean(read_golds(row, scales)[0]) for row in read_jsonl(file)])


def features_of(model: str, file: Path, scales: tuple[Scale, ...], kept: Path | None = None) -> Floats:
    """The features of each row of a file, `(n, H)`; nothing is read of its rationale.

    Args:
        model: The seed model.
        file: Rows with `prompt`.
        scales: How they write their scores.
        kept: A file of features by prompt, which are not computed again; what is new is added to it.
    """
    rows = list(read_jsonl(file))
    names = [digest([row["prompt"]]) for row in rows]
    known = dict(np.load(kept)) if kept is not None and kept.is_file() else {}
    # Answers to one question begin alike: side by side, that is computed once.
    order = sorted(range(len(rows)), key=lambda number: str(rows[number]["prompt"]))
    missing = {names[number]: rows[number] for number in order if names[number] not in known}
    if missing:
        known |= dict(zip(missing, _states(model, list(missing.values()), scales), strict=True))
        if kept is not None:
            np.savez(kept, **known)
    return np.stack([known[name] for name in names])


def _states(model: str, rows: list[Row], scales: tuple[Scale, ...]) -> list[Floats]:
    backend = TransformersBackend(model)
    template = Template(backend.tokenizer)
    states: list[Floats] = []
    found = []

    def keep(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        states.append(inputs[0][0, -1].double().cpu().numpy())

    hook = backend.model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        with reusing(backend):
            for row in rows:
                asked = template.ask(row)
                resolved = resolve_asked(template, row, scales)
                backend.next_token_logprobs([prefix_ids(template, asked, resolved, rationale="")], [0])
                found.append(states[-1])
                states.clear()
    finally:
        hook.remove()
    return found
