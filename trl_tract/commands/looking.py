"""Options of the commands that look at rows and judgements, and train nothing. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Any

from trl_tract.commands.options import ROWS
from trl_tract.text.options import option, required


@dataclass
class RecalibrateArguments:
    """Judgements of held-out items to fit on."""

    judgements: str = required(
        "Output directory of `trl-tract judge`, run without --recalibrate. The items must be ones that the "
        "judge was not trained on, and that you will not evaluate it on."
    )
    model: str | None = option(None, "Judge to save it with. By default the one that judged.")


@dataclass
class CheckArguments:
    """The rows to check and the model to check them for."""

    data: str = required(ROWS)
    model: str = required("Model to train. Only its tokenizer is loaded.")
    rows: list[int] = option([0], "Rows to show token by token, counted from 0.")
    max_length: int = option(3000, "Longest row, in tokens, as in training.")
    score_values: list[float] = option(
        [1.0, 2.0, 3.0, 4.0, 5.0], "The possible scores, as in training: 0 1 2, or 0..100."
    )
    score_texts: list[str] | None = option(None, "How the scores are written, if in words.")
    score_marker: str = option("[RESULT]", "Text before the score.")
    aspects: dict[str, Any] | str | None = option(
        None,
        "For several scores in one completion: their names, each with its `marker`, `values` and `texts`, "
        "as in training. JSON, or a mapping in a YAML file.",
    )
    drop_rationale: bool = option(False, "Check rows without their rationales.")
    chat_template_path: str | None = option(
        None, "Jinja file, or model, with the chat template to use, as in training."
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, "Variables of the chat template, as in training. JSON."
    )
    thinking: str = option(
        "auto", "Whether the rationale is the thinking, as in training.", choices=["auto", "off", "rationale"]
    )
    template_date: str | None = option(None, "Date given to the chat template, as in training.")

    def training(self) -> dict[str, Any]:
        """The fields of TRACTConfig among them."""
        scores = ("max_length", "score_values", "score_texts", "score_marker", "aspects", "drop_rationale")
        templates = ("chat_template_path", "chat_template_kwargs", "thinking", "template_date")
        return {name: getattr(self, name) for name in (*scores, *templates)}


@dataclass
class ReportArguments:
    """Judgements to report on."""

    judgements: list[str] = required(
        "Output directory of `trl-tract judge` or of `trl-tract run`. Two are compared; they must hold the same items."
    )
    n_bootstrap: int = option(1000, "Number of bootstrap resamples for the intervals.")
    html: str | None = option(
        None, "Also write an HTML page about the first judge, with its pictures as PNG files beside it."
    )
    data: str | None = option(
        None,
        "JSONL of the judged rows, whose prompts are shown on the page. By default rows.jsonl beside the "
        "judgements, or the items that a run held out.",
    )
    score_values: list[float] | None = option(
        None, "Scores that kappa and accuracy round to. By default the judge's own."
    )
