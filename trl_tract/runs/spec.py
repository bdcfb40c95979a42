"""What a run is asked for, as `run_tract` and the dry run share it. Knows nothing of how a run is done."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_tract.files.journal import digest
from trl_tract.scale.scales import Scales
from trl_tract.sources.columns import OwnColumns


@dataclass(frozen=True)
class RunSpec:
    """Model, rows and settings of both stages; the attributes are `run_tract`'s arguments.

    Attributes:
        model: Seed model.
        data: Rows to train on.
        eval_data: Held-out items, or None.
        eval_fraction: Part of the groups that is held out where there are no such items.
        own: The user's rubric and column names.
        training: Fields of TRACTConfig.
        model_args: Fields of TRL's ModelConfig.
        generation: Sampling of rationales.
        num_generations: Stage-two rows for each prompt.
        on_failure: What happens to rationales that fail.
        keep_annotated: Whether stage two has the annotated rationales too.
        backend: What generates.
    """

    model: str
    data: str
    eval_data: str | None = None
    eval_fraction: float = 0.1
    own: OwnColumns | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    num_generations: int = 1
    on_failure: str = "keep_gold"
    keep_annotated: bool = False
    backend: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scales(self) -> Scales:
        """How the rows write their scores."""
        return Scales.of(self.training)

    @property
    def seed(self) -> int:
        """Of the split and of training."""
        return int(self.training.get("seed", 42))

    def settings(self) -> dict[str, Any]:
        """Whatever changes the results of the run, by which its directory is recognised."""
        settings = {
            "model": self.model,
            "data": self.data,
            "eval_data": self.eval_data,
            "eval_fraction": self.eval_fraction,
            "training": digest([{name: value for name, value in self.training.items() if name != "output_dir"}]),
            "model_args": digest([self.model_args]),
            "generation": dict(self.generation),
            "num_generations": self.num_generations,
            "on_failure": self.on_failure,
            "keep_annotated": self.keep_annotated,
            "backend": self.backend.get("name", "transformers"),
        }
        return settings if self.own is None else settings | {"own_columns": asdict(self.own)}
