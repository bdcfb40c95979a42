"""TRACTTrainer: what SFTTrainer does differently for TRACT, and nothing else. Knows nothing of generation."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names, pack_dataset

from trl_tract.card import write_model_card
from trl_tract.config import TRACTConfig
from trl_tract.data import MODEL_COLUMNS, RowEncoder, ScoreCollator, check_columns, prepare_rows
from trl_tract.judge_config import JudgeConfig
from trl_tract.losses import raft_squared_error
from trl_tract.metrics import pearson, rmse, spearman
from trl_tract.prompts import ScoreNotFoundError
from trl_tract.rendering import as_prompt_completion, resolve_grid
from trl_tract.score_head import add_score_head
from trl_tract.scores import ScoreGrid, expected_score

logger = logging.get_logger(__name__)

_SUMS = ["nll", "tokens", "squared_error", "absolute_error", "expected", "grid_mass", "scores"]


class TRACTTrainer(SFTTrainer):
    """SFTTrainer with the CoT-RAFT loss: cross-entropy of the rationale plus squared error of the expected score.

        loss = rationale_weight * sum(nll) / tokens + raft_weight * sum((expected - gold)^2) / scores

    Both counts run over the whole accumulated batch on all ranks, so batch size, accumulation and world size do not
    change the update. The cross-entropy is TRL's own; one forward pass serves both terms.

    Args:
        model: Model id, directory, or loaded model, as for SFTTrainer.
        args: TRACTConfig; a plain SFTConfig or TrainingArguments is taken over field by field.
        data_collator: Has to pass `score_labels` on; leave it out for the default.
        train_dataset: Rows of `prompt`, `completion` and, if it is not the one in the completion, `score`; or
            `messages`, the last assistant turn being the completion.
        eval_dataset: Likewise, or a dict of datasets.
        processing_class: Tokenizer; it must be a fast one.
        **kwargs: Every other argument of SFTTrainer.

    Raises:
        ValueError: Rows without a score that can be trained on (see `TRACTConfig.invalid_rows`), a score that is
            not one token, or an argument that TRACT cannot honour.

    Source: Chiang, Lee, Lukasik, ACL 2025, https://aclanthology.org/2025.acl-long.147
    """

    _tag_names = ["trl", "tract"]  # noqa: RUF012  # TRL's own convention
    _name = "TRACT"
    _paper = {  # noqa: RUF012
        "title": "TRACT: Regression-Aware Fine-tuning Meets Chain-of-Thought Reasoning for LLM-as-a-Judge",
        "id": "2503.04381",
    }

    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func: TRACTTrainer computes the CoT-RAFT loss itself. Leave it out")
        if kwargs.get("formatting_func") is not None:
            raise ValueError(
                "formatting_func makes one text of a row, but TRACT needs prompt and completion apart. Leave it out, "
                "and make rows with `prompt` and `completion` beforehand: dataset.map(...)"
            )
        adapters = [kwargs.get("peft_config"), getattr(model, "active_peft_config", None)]
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters):
            raise ValueError(
                "prompt tuning puts virtual tokens before a row, so its score is no longer where it was found. Use LoRA"
            )
        model_name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        args = TRACTConfig.from_args(args, model_name.rstrip("/").split("/")[-1])
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ValueError(
                "skip_prepare_dataset in dataset_kwargs skips the step that finds the scores. Leave it out"
            )
        if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
            raise ValueError("the train dataset is empty")
        self.score_grid = ScoreGrid.from_values(args.score_values)
        self.judge_config: JudgeConfig | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self._is_vision_dataset:
            raise ValueError("the rows hold images: TRACTTrainer trains on text alone")
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError("context and sequence parallelism cut a rationale from its score: set both sizes to 1")
        if data_collator is None:
            # SFTTrainer refuses a custom collator with padding-free batches, so its own is replaced afterwards.
            self.data_collator = ScoreCollator(**vars(self.data_collator))
        self._values = torch.tensor(self.score_grid.values, device=self.accelerator.device)
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_score_head(base, self.score_grid.token_ids)
        self._num_scores: torch.Tensor | None = None
        self._score_sums = {mode: torch.zeros(len(_SUMS)) for mode in ("train", "eval")}
        self._eval_scores: list[torch.Tensor] = []

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: TRACTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(f"the {dataset_name} dataset is empty")
        columns = get_dataset_column_names(dataset)
        if "input_ids" in columns and not self.score_grid.token_ids:
            raise ValueError(
                f"the {dataset_name} dataset is tokenised (columns: {', '.join(sorted(columns))}), so the scores' "
                "tokens cannot be looked up in its text. Pass rows of text, with `prompt` and `completion`"
            )
        check_columns(columns, dataset_name)
        if "input_ids" not in columns:
            if self.judge_config is None:
                self._resolve_scores(dataset, args)
            encoder = RowEncoder(
                tokenizer=self._tokenizer,
                grid=self.score_grid,
                marker=args.score_marker,
                max_length=args.max_length,
                completion_only=self.completion_only_loss or "prompt" not in columns,
                score_in_ce=args.score_in_ce,
            )
            with PartialState().main_process_first():
                dataset = prepare_rows(
                    dataset,
                    encoder,
                    invalid_rows=args.invalid_rows,
                    num_proc=args.dataset_num_proc,
                    dataset_name=dataset_name,
                    warn=logger.warning,
                )
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if packing:
            # SFTTrainer's own packing keeps `input_ids` and `labels` alone.
            dataset = pack_dataset(dataset.select_columns(MODEL_COLUMNS), args.max_length, args.packing_strategy)
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def _resolve_scores(self, dataset: Dataset | IterableDataset, args: TRACTConfig) -> None:
        """Find the grid's tokens and the rows' way of writing a score in the first row that has one."""
        problem: ValueError | None = None
        looked_at = 0
        for row in itertools.islice(dataset, 1000):
            looked_at += 1
            try:
                grid, completion_format = resolve_grid(
                    self._tokenizer, as_prompt_completion(row), args.score_marker, self.score_grid
                )
            except ScoreNotFoundError as error:
                problem = problem or error
                continue
            self.score_grid = grid
            self.judge_config = JudgeConfig(grid, completion_format, args.normalize_grid)
            return
        scores = ", ".join(self.score_grid.texts)
        raise ValueError(
            f"none of the first {looked_at} rows has a score that can be found. Row 0: {problem}. Write every "
            f"completion as '<rationale> {args.score_marker} <score>', with a score of {scores}; another marker or "
            "grid is set by score_marker and score_values"
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "score_labels" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "score_labels"]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Count the scores of the accumulated batch where Trainer counts its tokens."""
        samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_scores = sum((_score_mask(batch).sum() for batch in samples), torch.zeros((), dtype=torch.int64))
        num_scores = num_scores.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_scores = self.accelerator.gather(num_scores).sum() // self.get_tp_size()
        self._num_scores = num_scores
        return samples, num_items_in_batch

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """CoT-RAFT: TRL's own cross-entropy, and the squared error of the expected score, from one forward pass."""
        inputs = dict(inputs)
        score_positions = _score_mask(inputs)  # (B, L - 1), aligned with the shifted labels
        gold = inputs.pop("score_labels")[:, 1:][score_positions]  # (S,)
        forwards: list[Any] = []

        def recorded(**kwargs: Any) -> Any:
            forwards.append(model(**kwargs))
            return forwards[-1]

        result = super().compute_loss(
            recorded, {**inputs, "score_positions": score_positions}, return_outputs, num_items_in_batch
        )
        rationale_loss, outputs = result if return_outputs else (result, None)

        probs = forwards[0].score_probs  # (S, K); later forwards, if any, only feed metrics
        squared_error = raft_squared_error(probs, gold, self._values, normalize=self.args.normalize_grid)
        if num_items_in_batch is None:
            score_loss = squared_error.sum() / max(len(gold), 1)
        else:
            score_loss = squared_error.sum() / self._num_scores.clamp(min=1)  # type: ignore[union-attr]
            if self.args.average_tokens_across_devices:
                # The count covers every rank, and DDP averages the gradients over ranks: like SFTTrainer's own term.
                score_loss = score_loss * (self.accelerator.num_processes // self.get_tp_size())
        self._record(forwards, inputs, probs.detach(), gold, squared_error.detach(), score_positions)
        loss = self.args.rationale_weight * rationale_loss + self.args.raft_weight * score_loss
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(
        self,
        forwards: list[Any],
        inputs: dict[str, Any],
        probs: torch.Tensor,
        gold: torch.Tensor,
        squared_error: torch.Tensor,
        score_positions: torch.Tensor,
    ) -> None:
        """Add this batch to the sums behind the logged means, on all ranks, without waiting for the device."""
        mode = "train" if self.model.training else "eval"
        expected = expected_score(probs, self._values, normalize=self.args.normalize_grid)
        fused = next(outputs for outputs in forwards if "log_probs" in outputs)
        sums = torch.stack(
            [
                -fused.log_probs.sum(),
                fused.label_mask.sum(),
                squared_error.sum(),
                (expected - gold).abs().sum(),
                expected.sum(),
                probs.sum(),
                torch.tensor(float(len(gold)), device=gold.device),
            ]
        ).double()
        self._score_sums[mode] = self._score_sums[mode].to(sums.device) + self.accelerator.reduce(sums, "sum")
        if mode == "eval":
            # Scores as (B, L - 1) rows, so that what the sampler repeats to fill the last batch can be left out.
            table = torch.full((2, *score_positions.shape), torch.nan, device=gold.device)
            table[:, score_positions] = torch.stack([expected, gold])
            table = self.accelerator.pad_across_processes(table.transpose(0, 1), dim=2, pad_index=torch.nan)
            pairs = self.accelerator.gather_for_metrics(table).transpose(0, 1).flatten(1)
            self._eval_scores.append(pairs[:, pairs[1].isfinite()].cpu())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRACT's means beside TRL's own; those of an evaluation come with its other metrics."""
        if self.model.training:
            logs.update(self._score_means("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Add the means and, over the whole evaluation set, the correlations: S numbers, never logits."""
        self._eval_scores.clear()
        self._score_sums["eval"].zero_()
        output = super().evaluation_loop(*args, **kwargs)
        values = self._score_means("eval")
        if self._eval_scores:
            expected, gold = torch.cat(self._eval_scores, dim=1).double().numpy()
            values["score/pearson"] = pearson(expected, gold)
            values["score/spearman"] = spearman(expected, gold)
            values["score/rmse"] = rmse(expected, gold)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in values.items()})
        return output

    def _score_means(self, mode: str) -> dict[str, float]:
        """The means since the last call, by the names under which they are logged; none where no score was seen."""
        sums = dict(zip(_SUMS, self._score_sums[mode].tolist(), strict=True))
        self._score_sums[mode].zero_()
        if not sums["scores"]:
            return {}
        return {
            "loss/rationale": sums["nll"] / max(sums["tokens"], 1),
            "loss/score": sums["squared_error"] / sums["scores"],
            "score/expected": sums["expected"] / sums["scores"],
            "score/mae": sums["absolute_error"] / sums["scores"],
            "score/grid_mass": sums["grid_mass"] / sums["scores"],
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside it `tract_config.json`, from which a judge reads grid and marker."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and self.judge_config is not None:
            self.judge_config.save(output_dir or self.args.output_dir)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write a model card that says what the judge scores and how to use it."""
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            write_model_card(
                self.args,
                self.judge_config,
                base_model=getattr(self.model.config, "_name_or_path", None),
                model_name=model_name,
                dataset_name=dataset_name,
                tags=[*self._tag_names, *tags],
                metrics=next((entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), {}),
            )


def _score_mask(batch: dict[str, Any]) -> torch.Tensor:
    """Where the batch's scores stand, bool `(B, L - 1)`, aligned with labels that are shifted by one."""
    if "score_labels" not in batch:
        raise ValueError(
            "the batch has no score_labels, so there is nothing to regress on. A custom data collator has to pad that "
            "column with NaN to the shape of input_ids; leave data_collator out for one that does"
        )
    return ~batch["score_labels"][:, 1:].isnan()  # type: ignore[no-any-return]
