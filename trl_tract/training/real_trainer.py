"""REALTrainer: what GRPOTrainer does differently where the reward is the model's own error. Knows no files of rows."""

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from trl_tract.backends.branches import several_tokens, why_not_one_forward
from trl_tract.backends.stop_text import Ending, StopText, Watch
from trl_tract.rows.golds import mean_golds
from trl_tract.rows.rendering import RenderedRow
from trl_tract.rows.row import RENDERED_WITH
from trl_tract.rows.template import Asked
from trl_tract.rows.tokens import asked_ids
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.training.adapters import mark_base, on_revision
from trl_tract.training.early_warnings import RolloutWarnings
from trl_tract.training.judge_trainer import KeepsJudge
from trl_tract.training.losses import ScoreTerms, score_terms
from trl_tract.training.real_config import REALConfig
from trl_tract.training.real_losses import EVEN_LENGTHS, advantages_of, divisors, gold_log_likelihood, sequence_ratio
from trl_tract.training.real_metrics import RolloutMetrics
from trl_tract.training.rollouts import Rollout, as_rollout, grouped, marker_stop, score_places, squared_error
from trl_tract.training.score_head import add_score_head
from trl_tract.training.starting import check_start, checked_rows, find_judge, load_policy, policy_tokenizer

logger = logging.get_logger(__name__)


class REALTrainer(KeepsJudge, GRPOTrainer):
    """GRPOTrainer whose reward is the judge's own squared error, with the gradient through both rationale and score.

        minimise  E over rationales s of  (expected score after s - gold)^2 - gold_weight * log p(gold | s)

    The policy term trains the rationale's tokens, as in GRPO; the direct term trains the score after it. One forward
    pass with gradient serves both, and one without gradient gives the rewards.

    Args:
        model: A judge saved by TRACTTrainer, whose grid, marker and template settings are used, or any causal language
            model: directory, hub id or loaded model. An existing adapter is trained further.
        args: REALConfig.
        train_dataset: Rows with `prompt` (text or chat messages) and `score` (a number within the grid's range, or a
            list with one for each annotator).
        eval_dataset: Likewise, or a dict of datasets. `num_generations_eval` rationales are written for each row.
        processing_class: Fast tokenizer. None: the model's own.
        **kwargs: `callbacks`, `optimizers`, `quantization_config` and `peft_config` of GRPOTrainer.

    Raises:
        ValueError: Rows without a gold score (see `REALConfig.invalid_rows`), a judge of several aspects, or an
            argument that cannot be honoured.

    Source: https://arxiv.org/abs/2603.17145
    """

    _tag_names = ["trl", "tract", "real"]  # noqa: RUF012  # TRL's own convention
    _name = "REAL"
    _paper = {"title": "REAL: Regression-Aware Reinforcement Learning for LLM-as-a-Judge", "id": "2603.17145"}  # noqa: RUF012

    judge_config: JudgeConfig
    _signature_columns: Any
    _buffered_inputs: Any

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = set(kwargs) - {"callbacks", "optimizers", "quantization_config", "peft_config"}
        if train_dataset is None and not unknown:
            raise ValueError("train_dataset is missing. Pass rows with `prompt` and `score`")
        if unknown:
            raise ValueError(
                f"{min(unknown)} is not supported: REALTrainer's reward is the judge's own error, after one rationale "
                "per turn. Leave it out"
            )
        model = fspath(model) if isinstance(model, PathLike) else model
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        args = REALConfig.from_args(args, name.rstrip("/").split("/")[-1] or "model")
        check_start(model, name, args, kwargs.get("peft_config"))
        if processing_class is None:
            processing_class = policy_tokenizer(name, (args.model_init_kwargs or {}).get("revision"))
        self._template, self.judge_config = find_judge(name, args, processing_class, train_dataset)
        (self.scale,) = self.judge_config.scales
        if isinstance(model, str):
            model = load_policy(model, processing_class, args, kwargs.get("quantization_config"))
            if not isinstance(model, str):
                # It was loaded with these; the host would say that they are ignored.
                kwargs.pop("quantization_config", None)
                args = copy.copy(args)
                args.model_init_kwargs = None
        if isinstance(model, str):
            config = AutoConfig.from_pretrained(model, revision=(args.model_init_kwargs or {}).get("revision"))
            if "peft_config" in kwargs:
                kwargs["peft_config"] = on_revision(kwargs["peft_config"], args.model_init_kwargs)
        else:
            config = model.config
        room = getattr(config.get_text_config(), "max_position_embeddings", None)
        check = functools.partial(checked_rows, self._template, self.judge_config, args, room)
        train_dataset = self._trained_rows = check(train_dataset, "train")
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {key: check(rows, key) for key, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = check(eval_dataset, "eval")
        super().__init__(
            model=model,
            reward_funcs=[squared_error],
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        mark_base(self.model)
        self._add_score_head()
        worst = (self.scale.grid.values[-1] - self.scale.grid.values[0]) ** 2
        self._penalty = worst if args.no_score_penalty is None else args.no_score_penalty
        self._values = torch.tensor(self.scale.grid.values, device=self.accelerator.device)
        # Of the batch that is being generated, in its order: the prompts, the rationales, all ranks' advantages.
        self._asked: list[Asked] = []
        self._rollouts: list[Rollout] = []
        self._new_advantages = torch.empty(0)
        # Of a forward pass that scores too: whose rows have a score; what came out.
        self._scored: torch.Tensor | None = None
        self._outputs: Any = None
        self._logps: Any = None
        self._sampled_prompts: list[list[int]] = []
        self._golds: list[float] = []
        self._rollout_metrics = {mode: RolloutMetrics() for mode in ("train", "eval")}
        self._warnings = RolloutWarnings(self.scale.grid.values, self._penalty)
        # A marker inside the thinking does not count, but an engine would stop there.
        if self.use_vllm and self._template.settings.thinking != "rationale":
            given = (own := self.vllm_generation.generation_kwargs).get("stop") or []
            stops = [given] if isinstance(given, str) else list(given)
            self.vllm_generation.generation_kwargs = {**own, "stop": [*stops, self.scale.marker]}

    def _add_score_head(self) -> None:
        base = self.accelerator.unwrap_model(self.model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        self._takes_positions = "position_ids" in inspect.signature(base.forward).parameters
        grid, share = self.scale.grid, self.args.share_prompts
        refusal = why_not_one_forward(base) if grid.paths or share else None
        add_score_head(base, [grid], one_forward=refusal is None, share=share)
        if grid.paths:
            self._warn([several_tokens(grid.trie, refusal)])
        if share and refusal is not None:
            self._warn([f"share_prompts has no effect: {refusal}. Each rationale's prompt is computed separately"])

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        own = ["score", "completion", *RENDERED_WITH]
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *own]))

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)

        def set_epoch(epoch: int) -> None:
            # The host's sampler draws on from one generator: resumed in a later epoch, it would begin anew.
            if sampler.shuffle:
                sampler.generator.manual_seed(self.args.seed + epoch)

        sampler.set_epoch = set_epoch
        return sampler

    # Generation: prompts as the judge is asked, rationales cut at the marker.

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [asked_ids(self._template, asked) for asked in self._asked], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._stopping_at_the_marker():
            return super()._generate_single_turn(*args, **kwargs)

    @contextmanager
    def _stopping_at_the_marker(self) -> Iterator[None]:
        if self.use_vllm:  # which was told before
            yield
            return
        model = self.accelerator.unwrap_model(self.model_wrapped)
        ending = Ending(self._template.tokenizer, marker_stop(self.scale, [asked.frame for asked in self._asked]))
        generate = model.generate

        def stopping(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            rows, length = input_ids.shape
            watch = StopText([Watch(ending, set()) for _ in range(rows)], [length] * rows)
            return generate(*args, input_ids=input_ids, stopping_criteria=StoppingCriteriaList([watch]), **kwargs)

        model.generate = stopping
        try:
            yield
        finally:
            del model.generate

    def _generate(self, prompts: list[Any]) -> Any:
        prompt_ids, completion_ids, _, completions, logprobs, *rest = super()._generate(prompts)
        told = logprobs or [None] * len(completion_ids)
        self._rollouts = [
            as_rollout(self._template, asked, self.scale, ids, own)
            for asked, ids, own in zip(self._asked, completion_ids, told, strict=True)
        ]
        # Of whole turns, and a rationale ends none: told of under names of their own.
        for name in [name for name in self._metrics[self._mode] if name.startswith("completions/")]:
            del self._metrics[self._mode][name]
        mask = [[1] * each.sampled + [0] * (len(each.ids) - each.sampled) for each in self._rollouts]
        own_logprobs = None if logprobs is None else [each.logprobs for each in self._rollouts]
        ids = [each.ids for each in self._rollouts]
        self._sampled_prompts = prompt_ids
        return prompt_ids, ids, mask, completions, own_logprobs, *rest

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.args.share_prompts and self.model.training and self._buffered_inputs is not before:
            self._buffered_inputs = grouped(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    # Rewards: of the present model, in one forward pass without gradient.

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        device = self.accelerator.device
        scored = torch.tensor([each.scored for each in self._rollouts], device=device)
        logprobs = self._score_logprobs(scored)  # (N, K), of the scored ones alone something
        gold = torch.tensor(self._golds, dtype=logprobs.dtype, device=device)
        loss, terms = self._losses(logprobs, gold)
        loss = loss.where(scored, torch.full_like(loss, self._penalty))
        scores = [loss, gold, terms.expected, terms.squared_error, logprobs.exp().sum(dim=1), scored]
        sizes = loss.new_tensor([[each.sampled, each.rewritten] for each in self._rollouts])
        # Of all ranks.
        table: torch.Tensor = self.accelerator.gather(torch.cat([torch.stack(scores, dim=1), sizes], dim=1))
        num_generations = self.num_generations if self._mode == "train" else self.num_generations_eval
        self._rollout_metrics[self._mode].add(table, num_generations)
        rewards: torch.Tensor = -table[:, 0]
        self._new_advantages = torch.zeros_like(rewards)
        if num_generations > 1:
            normalised = self.args.advantages == "normalised"
            self._new_advantages = advantages_of(rewards, num_generations, normalised=normalised)
        return rewards[:, None]

    def _losses(self, logprobs: torch.Tensor, gold: torch.Tensor) -> tuple[torch.Tensor, ScoreTerms]:
        """What each score adds to the objective, `(S,)`, and what it is made of."""
        normalize, weight = self.judge_config.normalize_grid, self.args.gold_weight
        terms = score_terms(logprobs, gold, self._values, raft_weight=1.0, normalize=normalize)
        if not weight:
            return terms.squared_error, terms
        return terms.squared_error - weight * gold_log_likelihood(logprobs, gold, self._values), terms

    @torch.no_grad()
    def _score_logprobs(self, scored: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the grid behind each rationale, `(N, K)`; 0 where no score can follow."""
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        found = []
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            for start in range(0, len(scored), size):
                rows = range(start, min(start + size, len(scored)))
                ids = [torch.tensor([*self._sampled_prompts[row], *self._rollouts[row].ids]) for row in rows]
                mask = pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side="right")
                input_ids = pad(ids, padding_value=self._tokenizer.pad_token_id, padding_side="right")
                mask, input_ids = mask.to(scored.device), input_ids.to(scored.device)
                with self.accelerator.autocast():
                    outputs = self.model(
                        input_ids=input_ids,
                        attention_mask=mask,
                        labels=torch.full_like(input_ids, -100),
                        fused_lm_head=True,
                        score_positions=score_places(mask, scored[rows.start : rows.stop]),
                    )
                own = outputs.score_logprobs
                found.append(own.new_zeros(len(rows), own.shape[1]))
                found[-1][scored[rows.start : rows.stop]] = own
        return torch.cat(found)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._asked = [self._template.ask(row) for row in inputs]
        self._golds = [self._gold(row) for row in inputs]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = self._new_advantages[first : first + len(inputs)]
        logged = self._logs["advantages"]  # its last are the host's
        kept = list(logged)[: max(len(logged) - len(self._new_advantages), 0)]
        logged.clear()
        logged.extend([*kept, *self._new_advantages.tolist()])
        device = self.accelerator.device
        output["gold"] = torch.tensor(self._golds, dtype=self._new_advantages.dtype, device=device)
        output["scored"] = torch.tensor([each.scored for each in self._rollouts], device=device)
        count = self.num_generations if self._mode == "train" else self.num_generations_eval
        output["group"] = torch.arange(first, first + len(inputs), device=device) // count
        return output

    def _gold(self, row: Mapping[str, Any]) -> float:
        golds = mean_golds(row, [self.scale])
        if golds is None:
            raise ValueError("a row of the stream has no `score`. Give every row a gold score")
        return golds[0]

    # The loss: TRL's own policy term, and the direct term from the same forward pass.

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        scored = self._scored

        def forward(**inputs: Any) -> Any:
            mask = inputs["attention_mask"]
            if self._takes_positions:
                # Prompts are padded on the left, and GPT-2 would count the padding, which generation does not.
                inputs["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            if scored is None:
                return model(**inputs)
            outputs = model(**inputs, score_positions=score_places(mask, scored))
            self._outputs = outputs.score_logprobs
            return outputs

        found = super()._get_per_token_logps_and_entropies(forward, *args, **kwargs)
        if scored is not None:
            self._logps = found[0]
        return found

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """GRPO's own loss of the rationale's tokens, and the direct term from the same forward pass."""
        inputs = dict(inputs)
        scored, gold, _ = inputs.pop("scored"), inputs.pop("gold"), inputs.pop("group")
        training = self.model.training
        mask = inputs["completion_mask"] * inputs["tool_mask"]  # (B, T), sampled tokens
        batches = self.args.steps_per_generation if training else 1
        count = len(mask) * batches * self.accelerator.num_processes
        divided = divisors(
            self.loss_type,
            mask,
            max_completion_length=self.max_completion_length,
            mean_length=inputs["num_items_in_batch"].clamp(min=1).to(inputs["advantages"]) / count,
        )
        if self.args.advantages == "unbiased" and self.loss_type not in EVEN_LENGTHS:
            # Long and short rationales would not weigh alike, and no factor of the direct term could make up for that.
            even = inputs["num_items_in_batch"].clamp(min=1).to(divided) / count
            inputs["advantages"] = inputs["advantages"] * divided / even
            divided = even.expand_as(divided)
        self._scored = scored
        try:
            policy_loss: torch.Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._scored = None
        if not training:
            return policy_loss  # `evaluation_loop` knows the loss of all rationales
        loss, _ = self._losses(self._outputs, gold[scored])
        ratio = sequence_ratio(
            self._logps,
            inputs.get("old_per_token_logps"),
            inputs.get("importance_sampling_ratio"),
            mask,
            self.args.vllm_importance_sampling_clip_max,
        )
        direct_loss = (ratio[scored] * loss / divided[scored]).sum() / len(scored)
        # The host divides its own term by the accumulation steps, and leaves the sum as it is.
        weight = self.args.direct_weight / self.current_gradient_accumulation_steps
        return torch.add(policy_loss, direct_loss, alpha=weight)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Add means over all rationales; TRL's own loss would be a mean over batches of unequal sizes."""
        seen, prefix = self._rollout_metrics["eval"], kwargs.get("metric_key_prefix", "eval")
        self._metrics["eval"].clear()  # of `predict`, which logs nothing
        output = super().evaluation_loop(*args, **kwargs)
        means = seen.means()
        means |= {"loss": means["loss/expected"]} if means else {}
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what became of the rationales beside TRL's own means."""
        if self._mode == "train":
            means = self._rollout_metrics["train"].means()
            self._metrics["train"].update({name: [value] for name, value in means.items()})
            entropy = self._metrics["train"].get("entropy") or [float("nan")]
            self._warn(self._warnings.after_log(means, sum(entropy) / len(entropy), self.state.global_step))
        super().log(logs, start_time)

    def _rendered(self, row: Mapping[str, Any]) -> RenderedRow:
        asked = self._template.ask(row)
        return RenderedRow(asked, asked.text, (), (), ())
