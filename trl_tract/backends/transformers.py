"""Generation and exact log-probabilities with the transformers library, in this process.

Knows models, adapters, batches and memory; knows nothing of scores, markers or training.
"""

import inspect
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any, TypeVar, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from trl_tract.backends.base import Backend, Generation, Sampling, SamplingOptions, prompt_seeds
from trl_tract.backends.branches import TreePass, why_not_one_forward
from trl_tract.backends.continuation import Continuation
from trl_tract.backends.drawing import DrawEach, random_numbers
from trl_tract.backends.forward import common_prefixes, exact_head, innermost, last_logits, left_padded, shared_cache
from trl_tract.backends.loading import load, load_tokenizer, loaded_fingerprint, tokenizer_fingerprint
from trl_tract.backends.stop_text import LEAST_MASS, Ending, StopText
from trl_tract.backends.tokens import checked_ids
from trl_tract.scale.logprobs import trie_logprobs
from trl_tract.scale.trie import TokenTrie

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")


class TransformersBackend(Backend):
    """A causal language model run by `transformers`.

    A model that was handed in loaded is borrowed: its train or eval mode, its `generation_config` and the random
    state of the process are as before after each call.

    Attributes:
        name: `"transformers"`.
        model_id: What was loaded; for a model that came loaded, its `name_or_path` followed by ` (loaded)`, since its
            weights may have moved away from that checkpoint.
        model: The model that answers.
        tokenizer: Its tokenizer.
        batch_size: Sequences in one forward pass; halved for the rest of a call when the device runs out of memory.
        max_calls: 1: a batch at a time.
    """

    name = "transformers"
    max_calls = 1

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 8,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        merge_adapter: bool = False,
        revision: str | None = None,
    ) -> None:
        """Load a model, or take a loaded one.

        Args:
            model: Directory or hub id of a full model or of a PEFT adapter (loaded on the base that it names), or a
                loaded model.
            tokenizer: The checkpoint's own by default: the adapter's if it has one, else its base's.
            batch_size: Sequences in one forward pass; each of `n` continuations of a prompt is one.
            dtype: Of the weights; the checkpoint's own by default.
            device: Where to load; the accelerator if there is one, each process of `torchrun` or `accelerate launch`
                its own, else the CPU.
            merge_adapter: Add a loaded adapter into its base's weights. Decodes faster, but the sum is rounded to the
                weights' 16 bits, so scores move a little against the unmerged adapter. No effect on a full model.
            revision: Branch, tag or commit of the model on the hub; the newest on its main branch by default.

        Raises:
            ValueError: `batch_size` below 1; `dtype`, `device`, `merge_adapter` or `revision` given with a loaded
                model; an encoder-decoder; no tokenizer to be found; an adapter that does not name its base.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more")
        self.model: Any
        self._loading: dict[str, Any] = {}
        self._is_borrowed = not isinstance(model, str | PathLike)
        if isinstance(model, str | PathLike):
            self.model_id = fspath(model)
            self.model, self.tokenizer = load(self.model_id, tokenizer, dtype, device, merge_adapter, revision)
            self._loading = {"dtype": str(self.model.dtype), "merge_adapter": merge_adapter, "revision": revision}
            self._own_tokenizer = tokenizer_fingerprint(self.tokenizer) if tokenizer is None else {}
        else:
            if dtype is not None or device is not None or merge_adapter or revision is not None:
                raise ValueError(
                    "dtype, device, merge_adapter and revision apply to a model that is loaded here; this one is "
                    "loaded already: convert, move or merge it before handing it in"
                )
            origin = str(model.config.name_or_path)
            self.model = model
            self.model_id = f"{origin or type(model).__name__} (loaded)"
            if tokenizer is None and not origin:
                raise ValueError("the loaded model does not say where it came from: pass its tokenizer as well")
            self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(origin)
        if self.model.config.is_encoder_decoder:
            raise ValueError(f"{self.model_id} is an encoder-decoder; only causal language models can be used")
        self.batch_size = batch_size
        self._takes_branches: bool | None = None  # until it is asked

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        stop: str | None = None,
        seed: int | Sequence[int] = 0,
        on_progress: Callable[[int], None] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[list[Generation]]:
        """Sample `n` continuations of each prompt; see `Backend.generate`.

        Longest prompts run first, `batch_size` sequences at a time, so that padding is small and memory runs out early
        or never. Only the settings given here shape the text: those that the checkpoint brings (top-k, penalties,
        suppressed tokens) are set aside, but for its end-of-sequence tokens. The repetition penalty counts the
        prompt's tokens too. Each continuation draws its tokens by random numbers of its own: in float32 its text does
        not depend on what else is in its batch. Weights of 16 bits round differently in another batch, which can turn
        a token.
        """
        settings = Sampling(**sampling)
        settings.check(n, stop)
        rows = self._checked(prompts, "prompts")
        seeds = prompt_seeds(seed, len(rows))
        results: list[list[Generation]] = [[] for _ in rows]
        pending: deque[Continuation] = deque()
        resumed: deque[Continuation] = deque()
        for prompt in sorted(range(len(rows)), key=lambda row: -len(rows[row])):
            room = math.inf if self._context is None else self._context - len(rows[prompt])
            if room < 2:
                results[prompt] = [Generation("", "prompt_too_long", 0)] * n
            else:
                limit = int(min(settings.max_new_tokens, room))
                numbers = [random_numbers(seeds[prompt], sample, limit) for sample in range(n)]
                pending.extend(Continuation(prompt, rows[prompt], limit, own) for own in numbers)
        _report(on_progress, sum(bool(done) for done in results))
        ending = Ending(self.tokenizer, stop)
        eos = self._eos_ids()

        def step(batch: list[Continuation]) -> list[Continuation]:
            self._extend(batch, settings, eos, ending)
            doubted = [sequence for sequence in batch if sequence.doubt is not None]
            self._settle(doubted, ending)
            finished = 0
            for sequence in batch:
                if not sequence.goes_on:
                    at_eos = bool(sequence.written) and sequence.written[-1] in eos
                    written = ending.finish(sequence.written, at_eos=at_eos, taken=sequence.taken)
                    results[sequence.prompt].append(written)
                    finished += len(results[sequence.prompt]) == n
            _report(on_progress, finished)
            resumed.extend(sequence for sequence in doubted if sequence.goes_on)
            return [sequence for sequence in batch if sequence.goes_on and sequence not in doubted]

        with self._borrowed_model():
            self._in_batches(pending, step)
            while resumed:
                pending, resumed = resumed, deque()
                self._in_batches(pending, step)
        return results

    def next_token_logprobs(
        self, token_id_lists: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> NDArray[np.float64]:
        """Log-probabilities of `token_ids` as the next token; see `Backend.next_token_logprobs`.

        One forward pass of the model itself, so that logits which it caps or scales are capped or scaled; head and
        softmax are computed in float32. Rows that follow each other and begin alike, as the rationales of one prompt
        do, share the computation of their beginning.
        """
        rows = self._checked(token_id_lists, "token_id_lists")
        (wanted,) = self._checked([token_ids], "token_ids")
        logprobs = np.full((len(rows), len(wanted)), np.nan)
        window = self._context
        kin = common_prefixes(rows)
        fitting = [row for row in range(len(rows)) if window is None or len(rows[row]) <= window]

        def step(batch: list[int]) -> list[int]:
            last = last_logits(self.model, [rows[row] for row in batch], [kin[row][1] for row in batch], self._pad_id())
            # Softmax over all of V first: gathering before it would renormalise over the tokens asked for.
            last = last.to(torch.promote_types(last.dtype, torch.float32)).log_softmax(dim=-1)
            logprobs[batch] = last[:, wanted].double().cpu().numpy()
            return []

        fitting.sort(key=lambda row: (-kin[row][1], kin[row][0], -len(rows[row])))  # longest first, kin together
        with self._borrowed_model(), exact_head(self.model):
            self._in_batches(deque(fitting), step)
        return logprobs

    def trie_logprobs(self, token_id_lists: Sequence[Sequence[int]], trie: TokenTrie) -> NDArray[np.float64] | None:
        """Log-probabilities of whole scores, in one forward pass a batch; see `Backend.trie_logprobs`.

        The trie's inner nodes are appended as branches; see `branches.py`. A row that does not fit the context window
        with its branches is NaN. None if this model cannot be given branches.
        """
        rows = self._checked(token_id_lists, "token_id_lists")
        owner = innermost(self.model)
        if self._takes_branches is None:
            refusal = why_not_one_forward(owner)
            self._takes_branches = refusal is None
            if refusal is not None:
                logger.warning("scores of several tokens are asked for token by token: %s", refusal)
        if not self._takes_branches or "logits_to_keep" not in inspect.signature(owner.forward).parameters:
            return None
        logprobs = np.full((len(rows), len(trie.paths)), np.nan)
        room = math.inf if self._context is None else self._context - len(trie.nodes[-1])
        fitting = [row for row in range(len(rows)) if len(rows[row]) <= room]

        def step(batch: list[int]) -> list[int]:
            input_ids, attention_mask = left_padded([rows[row] for row in batch], self._pad_id(), self.model.device)
            position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
            behind = torch.zeros_like(attention_mask, dtype=torch.bool)
            behind[:, -1] = True
            tree = TreePass(trie, behind, owner.config.get_text_config(), share=True)

            def ends(module: Any, inputs: Any, output: Any) -> None:
                # Of each row the last token and its branches are all that the head is given.
                branches: Any = tree.split(output)
                output.last_hidden_state = torch.cat([output.last_hidden_state[:, -1:], branches], dim=1)  # (B, N, H)

            hooks = [
                owner.base_model.register_forward_pre_hook(tree.extend, with_kwargs=True),
                owner.base_model.register_forward_hook(ends),
            ]
            try:
                logits = self.model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    use_cache=False,
                    logits_to_keep=len(trie.nodes),
                ).logits  # (B, N, V)
            finally:
                for hook in hooks:
                    hook.remove()
            logprobs[batch] = trie_logprobs(logits[:, 0], logits[:, 1:], trie).double().cpu().numpy()
            return []

        with self._borrowed_model(), exact_head(self.model):
            self._in_batches(deque(sorted(fitting, key=lambda row: -len(rows[row]))), step)
        return logprobs

    def fingerprint(self) -> dict[str, str]:
        """Digests of a model that came loaded, as it is now; of one that was loaded here, `model_id` tells."""
        return loaded_fingerprint(self.model, self.tokenizer) if self._is_borrowed else {}

    @property
    def loaded_as(self) -> dict[str, Any]:
        """How a model was loaded here, as far as that moves its answers, and a tokenizer in use that is not its own."""
        if self._is_borrowed:
            return {}
        tokenizer = tokenizer_fingerprint(self.tokenizer)
        others = {
            f"given {name}": digest for name, digest in tokenizer.items() if digest != self._own_tokenizer.get(name)
        }
        return self._loading | others

    def _extend(self, batch: list[Continuation], settings: Sampling, eos: list[int], ending: Ending) -> None:
        """Write on every sequence until it ends, or until the first of them has no room left."""
        rows = [sequence.prompt_ids + sequence.written for sequence in batch]
        input_ids, attention_mask = left_padded(rows, self._pad_id(), self.model.device)
        length = input_ids.shape[1]
        criteria = StoppingCriteriaList()
        starts = [length - len(sequence.written) for sequence in batch]
        watch = StopText(ending, starts, [sequence.mentions for sequence in batch])
        if ending.stop is not None:
            criteria.append(watch)
        room = min(sequence.limit - len(sequence.written) for sequence in batch)
        draw = LogitsProcessorList()
        if settings.temperature > 0:
            numbers = [each.numbers[len(each.written) : len(each.written) + room] for each in batch]
            draw.append(DrawEach(numbers, settings.temperature, settings.top_p))
        penalty = settings.repetition_penalty
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=_settings(
                do_sample=False,
                repetition_penalty=None if penalty == 1 else penalty,
                max_new_tokens=room,
                eos_token_id=eos or None,
                pad_token_id=self._pad_id(),
            ),
            stopping_criteria=criteria,
            logits_processor=draw,
            # The last token is left to the decoding: its logits are what the rows of a prompt draw from.
            **shared_cache(self.model, [row[:-1] for row in rows], self._pad_id()),
        )
        for row, (sequence, new) in enumerate(zip(batch, output[:, length:].tolist(), strict=True)):
            # What follows the end is padding, and padding may be an end-of-sequence token too: the first end counts.
            ends = [place + 1 for place, token in enumerate(new) if token in eos][:1]
            if row in watch.ended_at:
                ends.append(watch.ended_at[row] - length)
            sequence.ended = bool(ends)
            sequence.written += new[: min(ends, default=len(new))]
            sequence.doubt = watch.doubts.get(row)

    def _settle(self, doubted: Sequence[Continuation], ending: Ending) -> None:
        """Ask whether a score was to be expected where something else was sampled; where none was, the text goes on."""
        if not doubted or ending.stop is None:
            return
        rows = [each.prompt_ids + each.written[: each.doubt[1].count] for each in doubted if each.doubt is not None]
        masses = np.exp(self.next_token_logprobs(rows, sorted(set(ending.stop.begins)))).sum(axis=1)
        for each, mass in zip(doubted, masses, strict=True):
            each.settle(float(mass), LEAST_MASS)

    def _in_batches(self, pending: deque[_Item], step: Callable[[list[_Item]], list[_Item]]) -> None:
        """Hand batches from the left of `pending` to `step`, and put back what it returns, until nothing is left."""
        size = self.batch_size
        while pending:
            batch = [pending.popleft() for _ in range(min(size, len(pending)))]
            out_of_memory = False
            try:
                left = step(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                left, out_of_memory = batch, True
            if out_of_memory:  # Outside the handler: the exception's frames hold the batch's tensors.
                if size == self.batch_size:
                    logger.warning(
                        "out of memory with %d sequences at a time: going on with smaller batches (batch_size=%d)",
                        len(batch),
                        self.batch_size,
                    )
                size = len(batch) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            pending.extendleft(reversed(left))

    @contextmanager
    def _borrowed_model(self) -> Iterator[None]:
        """The model in evaluation mode and without its checkpoint's sampling settings; both are put back."""
        owner = innermost(self.model)
        checkpoint_settings = owner.generation_config
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            # Set aside rather than overridden: fields such as `suppress_tokens` have no neutral value to pass.
            owner.generation_config = _settings()
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            owner.generation_config = checkpoint_settings
            for module, training in modes:
                module.training = training

    def _checked(self, rows: Sequence[Sequence[int]], what: str) -> list[list[int]]:
        return checked_ids(rows, what, self.model.config.get_text_config().vocab_size)

    @property
    def _context(self) -> int | None:
        """Tokens that the context window holds; None for a model without positions."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _eos_ids(self) -> list[int]:
        configured = innermost(self.model).generation_config.eos_token_id
        ids = configured if isinstance(configured, list | tuple) else [configured]
        return sorted({int(token) for token in (*ids, self.tokenizer.eos_token_id) if token is not None})

    def _pad_id(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < self.model.config.get_text_config().vocab_size:
                return int(token)
        return 0  # Any id does: padding is masked, and cut off behind the end of a text.


def _report(on_progress: Callable[[int], None] | None, finished: int) -> None:
    if on_progress is not None and finished:
        on_progress(finished)


def _settings(**fields: Any) -> Any:
    generation_config: Any = GenerationConfig  # Its constructor is untyped.
    return generation_config(**fields)
