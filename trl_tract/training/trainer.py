"""TRACTTrainer: what SFTTrainer does differently for TRACT, and nothing else. Knows nothing of generation."""

import copy
from collections.abc import Iterator
from os import PathLike, fspath
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from transformers.utils import logging
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names, pack_dataset

from trl_tract.backends.branches import attention_cost, several_tokens, why_not_one_forward
from trl_tract.rows.dataset import (
    ScoreCollator,
    check_columns,
    check_dataset,
    check_scored,
    find_scales,
    prepare_rows,
    score_mask,
)
from trl_tract.rows.encoding import (
    ASPECT_COLUMN,
    Encoder,
    RowEncoder,
    TokenisedRowEncoder,
    annotator_columns,
    model_columns,
)
from trl_tract.rows.rendering import RenderedRow, asks_in_chat, render_row, settled
from trl_tract.rows.row import Row
from trl_tract.rows.template import Template
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.trie import TokenTrie
from trl_tract.training.adapters import mark_base, on_revision
from trl_tract.training.arguments import check_arguments, check_data, check_made
from trl_tract.training.config import TRACTConfig
from trl_tract.training.early_warnings import EarlyWarnings
from trl_tract.training.judge_eval import check_metric, judged_now, prepare_judging
from trl_tract.training.judge_trainer import KeepsJudge
from trl_tract.training.losses import score_terms
from trl_tract.training.resuming import settings_of
from trl_tract.training.score_head import add_score_head
from trl_tract.training.score_metrics import ScoreMetrics
from trl_tract.training.sharing import savings, sharing_sampler, sharing_warnings

logger = logging.get_logger(__name__)


class TRACTTrainer(KeepsJudge, SFTTrainer):
    """SFTTrainer with the CoT-RAFT loss: cross-entropy of the rationale plus squared error of the expected score.

        loss = rationale_weight * sum(nll) / tokens + raft_weight * sum((expected - gold)^2) / scores

    Both counts are over the whole accumulated batch on all ranks, so batch size, accumulation and world size do not
    change the update. The cross-entropy is TRL's own; one forward pass serves both terms. The load-balancing loss of
    mixture-of-experts models is not scaled by the weights.

    Args:
        model: Hub id, directory or loaded model, as for SFTTrainer.
        args: TRACTConfig. A plain SFTConfig or TrainingArguments is converted field by field.
        data_collator: A collator that keeps `score_labels`. Leave it out for the default.
        train_dataset: Rows with `prompt`, `completion` and, if it differs from the one in the completion, `score` (a
            list has one score for each annotator); or rows with `messages`, whose last assistant turn is the
            completion. With `TRACTConfig.aspects`, rows have `scores`, a mapping of aspects to gold scores. Or
            tokenised rows: `input_ids`, `labels`, `score_labels` and, with aspects, `score_aspects`.
        eval_dataset: Like `train_dataset`, or a dict of datasets. `evaluate` uses the annotated rationales. A judge
            writes its own, and its errors can be much larger; measure them with `trl-tract judge`.
        processing_class: Fast tokenizer.
        **kwargs: Every other argument of SFTTrainer.

    Raises:
        ValueError: Rows without a usable score (see `TRACTConfig.invalid_rows`), scores with the same tokens, or an
            argument that TRACT does not support.

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
        model: str | PathLike[str] | PreTrainedModel,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        **kwargs: Any,
    ) -> None:
        model = fspath(model) if isinstance(model, PathLike) else model
        check_arguments(model, **kwargs)
        model_name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        args = TRACTConfig.from_args(args, model_name.rstrip("/").split("/")[-1])
        check_data(args, train_dataset, eval_dataset, data_collator)
        if isinstance(model, str) and "peft_config" in kwargs:
            kwargs["peft_config"] = on_revision(kwargs["peft_config"], args.model_init_kwargs)
        self._trained_rows, self.given_eval_rows = train_dataset, eval_dataset
        self.scales = args.scales  # their tokens are looked up in the rows
        self.judge_config: JudgeConfig | None = None
        self._columns = model_columns(self.scales, annotators=args.annotator_loss != "none")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        mark_base(self.model)
        check_made(self)
        if data_collator is None:
            # SFTTrainer refuses a custom collator with padding-free batches, so its own is replaced afterwards.
            annotators = annotator_columns(self.scales) if args.annotator_loss != "none" else []
            self.data_collator = ScoreCollator(**vars(self.data_collator), annotator_columns=annotators)
        self._also = ["annotator_labels"] if args.annotator_loss != "none" else []
        self._also += [ASPECT_COLUMN] if len(self.scales) > 1 else []
        self._add_score_head()
        self._num_scores: torch.Tensor | None = None
        names = [scale.name for scale in self.scales]
        self._score_metrics = {mode: ScoreMetrics(self.accelerator, names) for mode in ("train", "eval")}
        self._early_warnings = EarlyWarnings(self.args)
        self._judged: dict[str, float] = {}
        prepare_judging(self)

    def _add_score_head(self) -> None:
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        grids = [scale.grid for scale in self.scales]
        tries = [grid.trie for grid in grids if grid.paths]
        share = bool(self.args.share_prompts)
        refusal = why_not_one_forward(base) if tries or share else None
        add_score_head(base, grids, one_forward=refusal is None, share=share)
        if tries:
            self._warn([several_tokens(TokenTrie.union(tries), refusal)])
        if share:
            self._warn(sharing_warnings(refusal, self._adapter, self.args))
        self._shares = share and refusal is None
        # Of each scale a row, filled up with scores that cannot be.
        rows = [torch.tensor(grid.values) for grid in grids]
        values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.accelerator.device)
        self._values = values
        self._raft_weights = torch.tensor(self.args.raft_weights, device=self.accelerator.device)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: TRACTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        check_dataset(dataset, dataset_name)
        columns = get_dataset_column_names(dataset)
        check_columns(columns, self._columns, dataset_name)
        if self.judge_config is None:
            self.judge_config = self._find_scores(dataset, args)
        if "seq_lengths" in columns:
            return dataset  # prepared and packed before
        encoder = self._encoder(columns, args)
        with PartialState().main_process_first():
            prepared, kept = prepare_rows(
                dataset,
                encoder,
                invalid_rows=args.invalid_rows,
                num_proc=args.dataset_num_proc,
                dataset_name=dataset_name,
                warn=logger.warning,
            )
        if dataset is self._trained_rows and kept is not None and len(kept) < len(dataset):
            self._trained_rows = dataset.select(kept)
        dataset = prepared
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if packing:
            # SFTTrainer's own packing keeps `input_ids` and `labels` alone.
            dataset = pack_dataset(dataset.select_columns(self._columns), args.max_length, args.packing_strategy)
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
        return dataset

    def _find_scores(self, rows: Dataset | IterableDataset, args: TRACTConfig) -> JudgeConfig:
        """Look up the tokens of the scores, and how the rows write them."""
        settings = settled(self._tokenizer, settings_of(args), rows)
        self._template = Template(self._tokenizer, settings)
        self.scales = find_scales(self._template, rows, self.scales)
        return JudgeConfig(self.scales, args.normalize_grid, not args.drop_rationale, settings, asks_in_chat(rows))

    def _encoder(self, columns: list[str], args: TRACTConfig) -> Encoder:
        told = (self.scales, args.max_length, args.annotator_loss != "none")
        named: dict[str, Any] = {"tokenizer": self._tokenizer, "score_in_ce": args.score_in_ce}
        if "input_ids" in columns:
            return TokenisedRowEncoder(*told, **named)
        return RowEncoder(
            *told,
            **named,
            settings=self._template.settings,
            completion_only=args.completion_only_loss is not False,
            drop_rationale=args.drop_rationale,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self._columns]))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        sampler = sharing_sampler(rows, self.args, self._train_batch_size) if self._shares else None
        if sampler is None:
            return super()._get_train_sampler(train_dataset)  # type: ignore[no-any-return]
        attention = attention_cost(self.model.config.get_text_config())
        self._warn([savings(rows, list(sampler), sampler.batch_size, attention)])
        return sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Count the scores of the accumulated batch where Trainer counts its tokens."""
        samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_scores = sum((score_mask(batch).sum() for batch in samples), torch.zeros((), dtype=torch.int64))
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
        score_positions = score_mask(inputs, self._also)  # (B, L - 1), aligned with the shifted labels
        gold = inputs.pop("score_labels")[:, 1:][score_positions]  # (S,)
        annotators = inputs.pop("annotator_labels", None)  # (B, L, K)
        values, raft_weight, numbers = self._values[0], self._raft_weights[0], None
        inputs["score_positions"] = score_positions
        if ASPECT_COLUMN in inputs:
            inputs[ASPECT_COLUMN] = inputs[ASPECT_COLUMN][:, 1:]  # (B, L - 1)
            numbers = inputs[ASPECT_COLUMN][score_positions]  # (S,): whose each score is
            values, raft_weight = self._values[numbers], self._raft_weights[numbers]
        forwards: list[Any] = []

        def recorded(**kwargs: Any) -> Any:
            forwards.append(model(**kwargs))
            return forwards[-1]

        result = super().compute_loss(recorded, inputs, return_outputs, num_items_in_batch)
        rationale_loss, outputs = result if return_outputs else (result, None)

        logprobs = forwards[0].score_logprobs  # (S, K); later forwards, if any, only feed metrics
        terms = score_terms(
            logprobs,
            gold,
            values,
            raft_weight=raft_weight,
            normalize=self.args.normalize_grid,
            annotators=None if annotators is None else annotators[:, 1:][score_positions],
            annotator_weight=self.args.annotator_weight,
        )
        score_loss = self._mean_over_scores(terms.weighted, counted=num_items_in_batch is not None)

        mode = "train" if self.model.training else "eval"
        fused = next(outputs for outputs in forwards if "log_probs" in outputs)
        seen = self._score_metrics[mode]
        seen.add(fused, terms.expected, gold, terms.squared_error, logprobs, terms.annotator_loss, numbers)
        if mode == "eval":
            seen.add_pairs(terms.expected, gold, score_positions)
        loss = self.args.rationale_weight * rationale_loss + score_loss
        if self.aux_loss_enabled:
            # The experts' load balance is no part of the rationale. TRL adds it to the cross-entropy, but not with
            # label smoothing: top up what rationale_weight took away, or all of it.
            smoothed = self.label_smoother is not None and self.args.loss_type == "nll"
            present = 0.0 if smoothed else self.args.rationale_weight
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + (1 - present) * self.router_aux_loss_coef * forwards[0].aux_loss / steps
        return (loss, outputs) if return_outputs else loss

    def _mean_over_scores(self, per_score: torch.Tensor, *, counted: bool) -> torch.Tensor:
        """This micro-batch's part of the mean over all scores of the update; in evaluation its own mean."""
        if not counted:
            return per_score.sum() / max(len(per_score), 1)
        part = per_score.sum() / self._num_scores.clamp(min=1)  # type: ignore[union-attr]
        if self.args.average_tokens_across_devices:
            # The count covers every rank, and DDP averages the gradients over ranks: like SFTTrainer's own term.
            part = part * (self.accelerator.num_processes // self.get_tp_size())
        return part

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRACT's means beside TRL's own; those of an evaluation come with its other metrics."""
        if self.model.training:
            means = self._score_metrics["train"].means()
            self._warn(self._early_warnings.after_log(means, self.state.global_step))
            logs.update(self._shown(means))
        super().log(logs, start_time)

    def _shown(self, means: dict[str, float]) -> dict[str, float]:
        hidden = ("spread/", "loss/annotators") if self.args.annotator_loss == "none" else ("spread/",)
        return {name: value for name, value in means.items() if not name.startswith(hidden)}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train. `resume_from_checkpoint=True` continues from the last complete checkpoint.

        Raises:
            ValueError: There is no complete checkpoint, or it was trained with other scores or loss weights; or
                `metric_for_best_model` needs judging, and nothing is judged.
        """
        check_metric(self)
        self._warn(self._early_warnings.at_start())
        # Steps of an earlier training that were never logged.
        self._score_metrics["train"].clear()
        self._metrics["train"].clear()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as Trainer does. `eval_score/...` metrics use the annotated rationales, unlike `eval_judge/...`."""
        self._judged = judged_now(self, eval_dataset, metric_key_prefix)
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Add the means and, over the whole evaluation set, the correlations and the predictions."""
        seen = self._score_metrics["eval"]
        seen.clear()
        if self.compute_metrics is None:
            kwargs["prediction_loss_only"] = True  # or logits would be gathered, which nobody asked for
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        values = {**self._shown(seen.means()), **seen.correlations()}
        output.metrics.update({f"{prefix}_{name}": value for name, value in values.items()} | self._judged)
        self._judged = {}
        if seen.pairs:
            expected, gold = seen.predictions()
            output = output._replace(predictions=expected, label_ids=gold)
        return output

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict expected scores of new rows, given their rationales.

        Args:
            test_dataset: Rows as for training, not packed.
            ignore_keys: As for Trainer.
            metric_key_prefix: Prefix of the metric names.

        Returns:
            `predictions`: expected scores in rubric units, in the rows' order, `(n,)`; `label_ids`: gold scores,
            `(n,)`; with several scales `(n, A)` both, in their order. `metrics`: as from `evaluate`.

        Raises:
            ValueError: The score of a row cannot be found, regardless of `invalid_rows`: a missing prediction would
                shift the others. Or the rows are packed.
        """
        args = copy.copy(self.args)
        args.invalid_rows, args.shuffle_dataset = "raise", False
        rows = self._prepare_dataset(test_dataset, self.processing_class, args, False, None, "test")
        if "input_ids" in get_dataset_column_names(test_dataset):
            check_scored(rows, self.scales)
        own = self.args
        try:
            self.args = copy.copy(own)
            # The host also groups evaluation rows by length, and drops the last of them.
            self.args.train_sampling_strategy, self.args.dataloader_drop_last = "sequential", False
            return super().predict(rows, ignore_keys, metric_key_prefix)
        finally:
            self.args = own

    def _rendered(self, row: Row) -> RenderedRow:
        return render_row(self._template, row, self.scales)
