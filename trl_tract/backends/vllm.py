"""Generation and exact log-probabilities with vLLM, in this process.

Knows the engine, its arguments and adapters. vLLM and its CUDA come in with the first backend, not with this module.
"""

import difflib
import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from os import PathLike, fspath
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import AutoConfig, PreTrainedTokenizerBase

from trl_tract.backends.base import Sampling, settings_that_count
from trl_tract.backends.loading import adapter_config, load_tokenizer, tokenizer_id, whole_weights
from trl_tract.backends.request_loop import RequestLoop
from trl_tract.backends.requests import RequestBackend, Written
from trl_tract.backends.vllm_versions import require_vllm
from trl_tract.text.secrets import without_secrets

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # What vLLM makes room for.
# What it serves: weights of low rank on the base as it is. PiSSA, OLoRA, CorDA and LoftQ change the base.
_LORA_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_LORA_FIELDS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r"),
    *("target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "eva_config"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "runtime_config", "qalora_group_size"),
}


class VLLMBackend(RequestBackend):
    """A causal language model run by vLLM's asynchronous engine.

    The engine batches the requests of all threads, reuses common prefixes of prompts (prefix caching), and serves
    adapters unmerged on their 16-bit base.

    vLLM starts a process for its engine, so a script needs `if __name__ == "__main__":`. That process holds the GPU
    memory; `close`, or leaving a `with` block, frees it.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        request_seeds: bool = False,
        **engine_args: Any,
    ) -> None:
        """Start the engine.

        Args:
            model: Directory or hub id of a full model, or of a LoRA adapter (served on the base that it names).
            tokenizer: The checkpoint's own by default: the adapter's if it has one, else its base's.
            request_seeds: Give each request a seed of its own, so that a prompt's text no longer depends on what else
                is being written. vLLM's CPU engine can die of such requests.
            **engine_args: Any argument of vLLM's engine: `dtype`, `max_model_len`, `gpu_memory_utilization`, `seed`,
                `tensor_parallel_size`, `data_parallel_size`, ... Prefix caching is on unless switched off here.

        Raises:
            ImportError: vLLM is not installed, or too old.
            ValueError: An engine argument that vLLM does not have or that would make log-probabilities inexact; an
                encoder-decoder; bitsandbytes weights; an adapter without a base, or of a kind that vLLM cannot serve.
            RuntimeError: The engine does not start.
        """
        require_vllm()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        model_id = fspath(model)
        _check_arguments(engine_args, [field.name for field in fields(AsyncEngineArgs)])
        adapter = adapter_config(model_id)
        base_id = model_id if adapter is None else str(adapter.base_model_name_or_path)
        revision = engine_args.get("revision") if adapter is None else adapter.revision
        _check_checkpoint(base_id, revision)
        tokenizer_from = tokenizer_id(model_id, base_id)
        of_base = {} if revision is None else {"revision": revision}
        if of_base and tokenizer_from == base_id:
            of_base["tokenizer_revision"] = revision
        arguments = {
            "model": base_id,
            "tokenizer": tokenizer_from,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            **({} if adapter is None else _lora_arguments(model_id, adapter)),
            **of_base,
            **engine_args,
        }
        tokenizer = (
            tokenizer
            if tokenizer is not None
            else load_tokenizer(arguments["tokenizer"], arguments.get("tokenizer_revision"))
        )
        try:
            engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except (ValueError, TypeError) as error:  # Its own checks; pydantic's errors are ValueErrors.
            raise ValueError(without_secrets(f"vLLM refuses to run {base_id}: {error}")) from error
        except Exception as error:
            raise RuntimeError(f"vLLM's engine does not start on {base_id}: {error}. See its log above") from error
        config = engine.vllm_config
        limit = 2 * config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
        loop = RequestLoop(limit)
        self._engines = [engine]
        self.loaded_as = settings_that_count(engine_args)
        self._closing = weakref.finalize(self, _shut, loop, self._engines)
        self._numbers = itertools.count()
        self._adapter = None
        super().__init__(
            model_id,
            tokenizer,
            loop,
            context_length=engine.model_config.max_model_len,
            vocabulary=engine.model_config.get_vocab_size(),
            concurrency=limit,
            request_seeds=request_seeds,
        )
        if adapter is not None:
            self._adapter = LoRARequest(lora_name="judge", lora_int_id=1, lora_path=model_id)
            try:
                loop.wait_for(engine.add_lora(self._adapter))
            except BaseException as error:
                self.close()
                if isinstance(error, Exception):
                    raise ValueError(
                        f"vLLM cannot serve the adapter {model_id} unmerged: {error}. Merge it into its base, or use "
                        "TransformersBackend"
                    ) from error
                raise

    def close(self) -> None:
        """Stop the engine and its processes, and free their memory. Can be called more than once."""
        self._closing()

    async def _sample(
        self, prompt: list[int], n: int, stop: Sequence[str], settings: Sampling, seed: int | None, special: bool
    ) -> list[Written] | None:
        output = await self._complete(
            prompt,
            n=n,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            stop=list(stop),
            seed=seed,
            skip_special_tokens=not special,
        )
        written = []
        for one in sorted(output.outputs, key=lambda one: one.index):
            if one.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM gave up on a continuation ({one.finish_reason}). See its log above")
            written.append(Written(list(one.token_ids), one.text, one.finish_reason, one.stop_reason))
        return written

    async def _score(self, prompt: list[int], token_ids: list[int]) -> Mapping[int, float] | None:
        output = await self._complete(
            prompt, max_tokens=1, temperature=0.0, logprob_token_ids=token_ids, detokenize=False
        )
        (shown,) = output.outputs[0].logprobs
        return {token: float(shown[token].logprob) for token in token_ids}

    async def _complete(self, prompt: list[int], **sampling: Any) -> Any:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        # Everything that shapes the text is given here: the engine reads no defaults from the checkpoint.
        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        name = f"trl-tract-{next(self._numbers)}"
        output = None
        try:
            async for partly in self._engines[0].generate(
                tokens_input(prompt), params, name, lora_request=self._adapter
            ):
                output = partly
        except EngineDeadError as error:
            raise RuntimeError(f"vLLM's engine has died on {self.model_id}. See its log above") from error
        if output is None or not output.finished:
            raise RuntimeError(f"vLLM left a request of {len(prompt)} tokens unfinished. See its log above")
        return output


def _shut(loop: RequestLoop, engines: list[Any]) -> None:
    loop.cancel()
    engines[0].shutdown()
    # It shuts down again when it is deleted, and complains if that is while the interpreter is taken apart.
    engines[0].shutdown = lambda timeout=None: None
    loop.close()
    engines.clear()


def _check_arguments(engine_args: Mapping[str, Any], known: list[str]) -> None:
    for name in engine_args:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=3)
            hint = f": did you mean {' or '.join(similar)}?" if similar else ""
            raise ValueError(f"vLLM's engine has no argument {name!r}{hint}")
    if engine_args.get("logprobs_mode", "raw_logprobs") != "raw_logprobs":
        raise ValueError(
            f"logprobs_mode={engine_args['logprobs_mode']!r} would not report log-probabilities under the full "
            "vocabulary. Leave it out"
        )
    if engine_args.get("speculative_config"):
        raise ValueError(
            "speculative_config: with speculative decoding, vLLM gives no log-probabilities of chosen "
            "tokens. Leave it out"
        )
    if engine_args.get("trust_remote_code"):
        raise ValueError(
            "trust_remote_code=True would run code from the checkpoint. Only models that vLLM supports "
            "itself are allowed"
        )
    if engine_args.get("quantization") == "bitsandbytes":
        raise ValueError(
            "vLLM no longer reads bitsandbytes weights (since 0.28). Leave quantization out. An adapter trained on a "
            "4-bit base is served on the 16-bit base"
        )


def _check_checkpoint(base_id: str, revision: str | None = None) -> None:
    config = AutoConfig.from_pretrained(base_id, revision=revision, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ValueError(f"{base_id} is an encoder-decoder model. Only causal language models can be used")
    quantised = getattr(config, "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else getattr(quantised, "quant_method", "")
    if "bitsandbytes" in str(method).lower():
        raise ValueError(
            f"{base_id} holds bitsandbytes weights, which vLLM no longer reads (since 0.28). Use its 16-bit original "
            "instead; for an adapter, set base_model_name_or_path in adapter_config.json"
        )


def _lora_arguments(model_id: str, adapter: PeftConfig) -> dict[str, Any]:
    if str(getattr(adapter.peft_type, "value", adapter.peft_type)) != "LORA":
        raise ValueError(
            f"{model_id} is a {adapter.peft_type} adapter, but vLLM serves only LoRA. Use TransformersBackend"
        )
    plain = LoraConfig()
    odd = {
        field.name: getattr(adapter, field.name)
        for field in fields(plain)
        if field.name not in _LORA_FIELDS and getattr(adapter, field.name) != getattr(plain, field.name)
    }
    if odd.get("init_lora_weights", True) in _LORA_STARTS:
        odd.pop("init_lora_weights", None)
    kinds = ["DoRA" if name == "use_dora" else f"{name}={value!r}" for name, value in odd.items()]
    # vLLM multiplies all of an adapter by one factor.
    ranks, alphas = adapter.rank_pattern or {}, adapter.alpha_pattern or {}
    root = 0.5 if adapter.use_rslora else 1.0
    factors = {
        alphas.get(name, adapter.lora_alpha) / ranks.get(name, adapter.r) ** root for name in {*ranks, *alphas}
    } | {adapter.lora_alpha / adapter.r**root}
    if max(factors) > min(factors) * 1.001:
        kinds.append("rank_pattern or alpha_pattern give its modules different scaling factors")
    if not kinds and (whole := sorted(whole_weights(model_id))):
        kinds = [f"it holds {whole[0]} in full, as after a change of the vocabulary"]
    if kinds:
        raise ValueError(
            f"vLLM cannot serve {model_id} unmerged ({', '.join(kinds)}). Merge it, or use TransformersBackend"
        )
    rank = max([adapter.r, *(adapter.rank_pattern or {}).values()])
    fitting = [room for room in _LORA_RANKS if room >= rank]
    if not fitting:
        raise ValueError(
            f"{model_id} has rank {rank}, but vLLM serves ranks up to {_LORA_RANKS[-1]}. Merge it into its base"
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}
