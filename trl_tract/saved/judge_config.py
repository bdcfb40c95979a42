"""`tract_config.json`: what a judge has to know of its training, saved beside the weights. Knows nothing of models."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale
from trl_tract.scale.scales import Scales
from trl_tract.scale.text import CompletionFormat
from trl_tract.scale.trie import ScorePath

FILE_NAME = "tract_config.json"


@dataclass(frozen=True)
class JudgeConfig:
    """How a judge was trained to write a completion and its score.

    Attributes:
        grid: The score grid, its tokens resolved; of several aspects the first one's.
        format: Marker and the whitespace around it; likewise.
        normalize_grid: Whether the expected score is divided by the mass on the grid.
        num_scores: Scores in a completion.
        writes_rationale: False for a judge that was trained to give its score straight away.
        aspects: Where a completion has a score for each of several aspects: they, in their order.
    """

    grid: ScoreGrid
    format: CompletionFormat
    normalize_grid: bool = False
    num_scores: int = 1
    writes_rationale: bool = True
    aspects: tuple[Scale, ...] = ()

    @property
    def scales(self) -> Scales:
        """How the judge writes its scores."""
        return Scales(self.grid, self.format.marker, self.aspects)

    def to_dict(self) -> dict[str, Any]:
        """The content of `tract_config.json`."""
        saved: dict[str, Any] = {
            **_saved_grid(self.grid, self.format),
            "normalize_grid": self.normalize_grid,
            "num_scores": self.num_scores,
            "writes_rationale": self.writes_rationale,
        }
        if self.aspects:
            saved["aspects"] = {
                aspect.name: {**_saved_grid(aspect.grid, aspect.format), "raft_weight": aspect.raft_weight}
                for aspect in self.aspects
            }
        return saved

    def check_single_score(self, path: str | Path) -> None:
        """Refuse a model that writes several scores a completion: what generates reads one.

        Raises:
            ValueError: It does.
        """
        if self.num_scores != 1 and not self.aspects:
            raise ValueError(
                f"{path} was trained on rows with `scores`: it writes {self.num_scores} scores a completion, and "
                "generation stops at the first. Name them in `aspects`, each with its own marker, or train on rows of "
                "one `score`"
            )

    def save(self, directory: str | Path) -> None:
        """Write `tract_config.json` into `directory`."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        (Path(directory) / FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> "JudgeConfig":
        """Read `tract_config.json` of a model directory or hub id, there at `revision`.

        Raises:
            FileNotFoundError: There is none: the model was not trained by TRACTTrainer, or is somewhere else.
            ValueError: It cannot be read.
        """
        file = find_config(path, revision)
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                *_read_grid(saved),
                bool(saved["normalize_grid"]),
                int(saved.get("num_scores", 1)),
                bool(saved.get("writes_rationale", True)),
                tuple(
                    Scale(name, *_read_grid(each), each["raft_weight"])
                    for name, each in saved.get("aspects", {}).items()
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} cannot be read as {FILE_NAME}: {error!r}. Save the model again") from error


def _saved_grid(grid: ScoreGrid, written: CompletionFormat) -> dict[str, Any]:
    return {
        "score_values": list(grid.values),
        "score_texts": list(grid.texts),
        "score_token_ids": list(grid.token_ids),
        "score_paths": [asdict(path) for path in grid.paths],
        "completion_format": written.to_dict(),
    }


def _read_grid(saved: Mapping[str, Any]) -> tuple[ScoreGrid, CompletionFormat]:
    grid = ScoreGrid(
        values=tuple(float(value) for value in saved["score_values"]),
        texts=tuple(str(text) for text in saved["score_texts"]),
        token_ids=tuple(int(token) for token in saved["score_token_ids"]),
        paths=tuple(
            ScorePath(tuple(int(token) for token in path["token_ids"]), int(path["lead"]), int(path["end"]))
            for path in saved.get("score_paths", [])
        ),
    )
    return grid, CompletionFormat(**saved["completion_format"])


def find_config(path: str | Path, revision: str | None = None) -> Path:
    """The `tract_config.json` of a model directory or hub id, there at `revision`."""
    if Path(path).is_dir():
        file = Path(path) / FILE_NAME
        if file.is_file():
            return file
        missing = f"{file} is missing"
    elif Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        missing = f"{path} is not a model directory"
    else:
        from transformers.utils import cached_file

        try:
            found = cached_file(str(path), FILE_NAME, revision=revision)
        except OSError as error:
            raise FileNotFoundError(
                _no_config(f"no {FILE_NAME} at {path}{f', revision {revision}' if revision else ''}")
            ) from error
        return Path(str(found))
    raise FileNotFoundError(_no_config(missing))


def _no_config(what: str) -> str:
    return (
        f"{what}. It is saved by TRACTTrainer.save_model() beside the weights or the adapter. For a model that was "
        "trained otherwise, give the grid and the marker: CoTRAILJudge(backend, score_values=[...], score_marker=...)"
    )
