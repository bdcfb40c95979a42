"""Options of the commands that look at rows and judgements, and train nothing. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Any

from trl_tract.commands.options import ROWS
from trl_tract.text.options import option, required


@dataclass
class RecalibrateArguments:
    """Judgements of held-out items to fit on."""

    judgements: str = required(
        "Output directory of `trl-tract judge`, run with --recalibrate false. The judge must not have been trained on "
        "these items, and you must not evaluate it on them later."
    )
    model: str | None = option(
        None, "Judge to save the recalibration with. Defaults to the judge that made the judgements."
    )


@dataclass
class CheckArguments:
    """The rows to check and the model to check them for."""

    data: str = required(ROWS)
    model: str = required("Model that you want to train. Only its tokenizer is loaded.")
    rows: list[int] = option([0], "Numbers of the rows to show token by token, counting from 0.")
    max_length: int = option(3000, "Maximum length of a row in tokens, as in training.")
    drop_rationale: bool = option(False, "Check rows without their rationales.")
    chat_template_path: str | None = option(None, "Jinja file or model whose chat template is used, as in training.")
    template_date: str | None = option(None, "Date given to the chat template, as in training.")

    def training(self) -> dict[str, Any]:
        """The fields of TRACTConfig among them."""
        return {name: value for name, value in vars(self).items() if name not in ("data", "model", "rows")}


@dataclass
class ReportArguments:
    """Judgements to report on."""

    judgements: list[str] = required(
        "Output directory of `trl-tract judge` or `trl-tract run`. Give two to compare them; they must hold the same "
        "items."
    )
    n_bootstrap: int = option(1000, "Number of bootstrap resamples for the confidence intervals.")
    html: str | None = option(
        None, "Also write an HTML report on the first judge, with its charts as PNG files beside it."
    )
    data: str | None = option(
        None,
        "JSONL file with the judged rows, so that the HTML report can show their prompts. Defaults to rows.jsonl "
        "beside the judgements, or the held-out items of a run.",
    )
    score_values: list[float] | None = option(
        None, "Scores to round to for kappa and accuracy. Defaults to the judge's own scores."
    )
