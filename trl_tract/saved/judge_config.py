"""`tract_config.json`: what a judge has to know of its training, saved beside the weights. Knows nothing of models."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_tract.files.journal import write_json
from trl_tract.rows.template import NO_SETTINGS, TemplateSettings
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat
from trl_tract.scale.trie import ScorePath

FILE_NAME = "tract_config.json"
_DECIDED = ("score_values", "score_marker", "completion_format", "aspects")  # by the training


@dataclass(frozen=True)
class JudgeConfig:
    """How a judge was trained to write a completion and its scores.

    Attributes:
        scales: The scales of a completion in their order, tokens resolved; the name of a single one is empty.
        normalize_grid: Whether the expected score is divided by the mass on the grid.
        writes_rationale: False for a judge that was trained to give its scores straight away.
        template: What its chat template is rendered with.
        chat: Whether its prompts are chat messages; None where that is not known.
    """

    scales: tuple[Scale, ...]
    normalize_grid: bool = False
    writes_rationale: bool = True
    template: TemplateSettings = NO_SETTINGS
    chat: bool | None = None

    @property
    def format(self) -> CompletionFormat:
        """Marker and whitespace of the first scale."""
        return self.scales[0].format

    @property
    def arguments(self) -> dict[str, Any]:
        """The scales as arguments of a judge."""
        if len(self.scales) > 1:
            return {"aspects": {scale.name: scale.to_dict() for scale in self.scales}}
        grid = self.scales[0].grid
        return {"score_values": dict(zip(grid.texts, grid.values, strict=True)), "completion_format": self.format}

    def with_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of who asks the model that was trained: as in training, but for the settings.

        Raises:
            ValueError: A setting that the training has decided.
        """
        if decided := [name for name in _DECIDED if name in settings]:
            raise ValueError(f"{decided[0]} is read from {FILE_NAME}, as in training. Leave it out")
        return {**self.arguments, **self.template.arguments, **settings}

    def asks_chat(self, tokenizer: Any) -> bool:
        """Whether prompts are chat messages: as in training or, where that is not known, as the tokenizer has it."""
        return bool(tokenizer.chat_template) if self.chat is None else self.chat

    def to_dict(self) -> dict[str, Any]:
        """The content of `tract_config.json`.

        The first scale stands at the top, where an older reader looks for the only one.
        """
        saved: dict[str, Any] = {
            **_saved_scale(self.scales[0]),
            "normalize_grid": self.normalize_grid,
            "num_scores": len(self.scales),
            "writes_rationale": self.writes_rationale,
            **self.template.arguments,
            "chat": self.chat,
        }
        if len(self.scales) > 1:
            saved["aspects"] = {
                scale.name: {**_saved_scale(scale), "raft_weight": scale.raft_weight} for scale in self.scales
            }
        return saved

    def save(self, directory: str | Path) -> None:
        """Write `tract_config.json` into `directory`."""
        write_json(Path(directory) / FILE_NAME, self.to_dict())

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> "JudgeConfig":
        """Read `tract_config.json` of a model directory or hub id, there at `revision`.

        Raises:
            FileNotFoundError: There is none: the model was not trained by TRACTTrainer, or is somewhere else.
            ValueError: It cannot be read.
        """
        file = _find(path, revision)
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            scales = tuple(_read_scale(name, each) for name, each in saved.get("aspects", {"": saved}).items())
            count = int(saved.get("num_scores", 1))
            config = cls(
                scales,
                bool(saved["normalize_grid"]),
                bool(saved.get("writes_rationale", True)),
                TemplateSettings.from_dict(saved),
                saved.get("chat"),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} cannot be read as {FILE_NAME}: {error!r}. Save the model again") from error
        if count != len(scales):
            raise ValueError(
                f"{file}: the model writes {count} scores after the same marker, so they cannot be told apart. Train "
                "it again on completions with one marker per score, named in `aspects`"
            )
        return config


def _saved_scale(scale: Scale) -> dict[str, Any]:
    return {
        "score_values": list(scale.grid.values),
        "score_texts": list(scale.grid.texts),
        "score_token_ids": list(scale.grid.token_ids),
        "score_paths": [asdict(path) for path in scale.grid.paths],
        "completion_format": scale.format.to_dict(),
    }


def _read_scale(name: str, saved: Mapping[str, Any]) -> Scale:
    grid = ScoreGrid(
        values=tuple(float(value) for value in saved["score_values"]),
        texts=tuple(str(text) for text in saved["score_texts"]),
        token_ids=tuple(int(token) for token in saved["score_token_ids"]),
        paths=tuple(
            ScorePath(tuple(int(token) for token in path["token_ids"]), int(path["lead"]), int(path["end"]))
            for path in saved.get("score_paths", [])
        ),
    )
    return Scale(name, grid, CompletionFormat(**saved["completion_format"]), saved.get("raft_weight"))


def _find(path: str | Path, revision: str | None) -> Path:
    """The `tract_config.json` of a model directory or hub id, there at `revision`."""
    file = Path(path) / FILE_NAME
    cause: OSError | None = None
    if file.is_file():
        return file
    if Path(path).is_dir():
        missing = f"{file} is missing"
    elif Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        missing = f"{path} is not a model directory"
    else:
        from transformers.utils import cached_file

        try:
            return Path(str(cached_file(str(path), FILE_NAME, revision=revision)))
        except OSError as error:
            missing, cause = f"no {FILE_NAME} at {path}{f', revision {revision}' if revision else ''}", error
    raise FileNotFoundError(
        f"{missing}. It is saved by TRACTTrainer.save_model() beside the weights or the adapter. For a model that was "
        "trained with other code, give the grid and the marker: CoTRAILJudge(backend, score_values=[...], "
        "score_marker=...)"
    ) from cause
