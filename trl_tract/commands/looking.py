"""Options of the commands that look at rows and judgements, and train nothing. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Any

from trl_tract.commands.options import ROWS


@dataclass
class RecalibrateArguments:
    """Judgements of held-out items to fit on."""

    judgements: str = field(
        metadata={
            "help": "Output directory of `trl-tract judge`, run without --recalibrate. The items must be ones that the "
            "judge was not trained on, and that you will not evaluate it on."
        }
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Judge to save it with. By default the one that judged."},
    )


@dataclass
class CheckArguments:
    """The rows to check and the model to check them for."""

    data: str = field(metadata={"help": ROWS})
    model: str = field(metadata={"help": "Model to train. Only its tokenizer is loaded."})
    rows: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Rows to show token by token, counted from 0."}
    )
    max_length: int = field(default=3000, metadata={"help": "Longest row, in tokens, as in training."})
    score_values: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 5.0],
        metadata={"help": "The possible scores, as in training: 0 1 2, or 0..100."},
    )
    score_texts: list[str] | None = field(default=None, metadata={"help": "How the scores are written, if in words."})
    score_marker: str = field(default="[RESULT]", metadata={"help": "Text before the score."})
    aspects: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "For several scores in one completion: their names, each with its `marker`, `values` and `texts`, "
            "as in training. JSON, or a mapping in a YAML file."
        },
    )
    drop_rationale: bool = field(default=False, metadata={"help": "Check rows without their rationales."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja file, or model, with the chat template to use, as in training."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Variables of the chat template, as in training. JSON."}
    )
    thinking: str = field(
        default="auto",
        metadata={
            "help": "Whether the rationale is the thinking, as in training.",
            "choices": ["auto", "off", "rationale"],
        },
    )
    template_date: str | None = field(
        default=None, metadata={"help": "Date given to the chat template, as in training."}
    )

    def training(self) -> dict[str, Any]:
        """The fields of TRACTConfig among them."""
        scores = ("max_length", "score_values", "score_texts", "score_marker", "aspects", "drop_rationale")
        templates = ("chat_template_path", "chat_template_kwargs", "thinking", "template_date")
        return {name: getattr(self, name) for name in (*scores, *templates)}


@dataclass
class ReportArguments:
    """Judgements to report on."""

    judgements: list[str] = field(
        metadata={
            "help": "Output directory of `trl-tract judge` or of `trl-tract run`. Two are compared; they must hold "
            "the same items."
        }
    )
    n_bootstrap: int = field(default=1000, metadata={"help": "Number of bootstrap resamples for the intervals."})
    html: str | None = field(
        default=None,
        metadata={"help": "Also write an HTML page about the first judge, with its pictures as PNG files beside it."},
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "JSONL of the judged rows, whose prompts are shown on the page. By default rows.jsonl beside the "
            "judgements, or the items that a run held out."
        },
    )
    score_values: list[float] | None = field(
        default=None, metadata={"help": "Scores that kappa and accuracy round to. By default the judge's own."}
    )
