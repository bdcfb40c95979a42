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
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_tract.backends.base import Backend, Generation, Sampling, SamplingOptions, prompt_seeds
from trl_tract.backends.branches import evaluating, why_not_one_forward
from trl_tract.backends.continuation import Continuation
from trl_tract.backends.decoding import Decoding
from trl_tract.backends.drawing import Drawing, random_numbers
from trl_tract.backends.forward import Forward, exact_head, why_not_shared
from trl_tract.backends.key_values import KeyValueTree, arranged
from trl_tract.backends.loading import load, load_tokenizer, loaded_fingerprint, tokenizer_fingerprint
from trl_tract.backends.room import Room
from trl_tract.backends.stop_text import LEAST_MASS, Ending
from trl_tract.backends.tokens import checked_ids
from trl_tract.backends.whole import branched, innermost, no_settings, whole_rows, write_with_generate
from trl_tract.scale.logprobs import trie_logprobs
from trl_tract.scale.trie import TokenTrie

logger = logging.getLogger(__name__)


class TransformersBackend(Backend):
    """A causal language model run by `transformers`.

    A model that you pass in loaded is not changed: its train or eval mode, its `generation_config` and the random state
    of the process are restored after each call.

    Attributes:
        model_id: Directory or hub id of the model. For a model passed in loaded, its `name_or_path` followed by `
            (loaded)`, because its weights may differ from that checkpoint.
        batch_tokens: Maximum number of tokens in a batch, including padding and prompts. Both limits are halved for the
            rest of a call when the device runs out of memory.
    """

    name = "transformers"
    max_calls = 1

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 32,
        batch_tokens: int = 32768,
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
            batch_size: Sequences in one forward pass at most; each of `n` continuations of a prompt is one.
            batch_tokens: Tokens of all sequences of a batch at most, padding and prompts included: their keys and
                values are in memory at once. An eighth as many are kept of prompts that others begin like, and while
                items are judged once more as many of all that is asked again.
            dtype: Of the weights, or `auto`: the checkpoint's own. So by default, but on a CPU that is slow in 16 bits:
                there float32, if half of the memory holds the weights.
            device: Where to load; the accelerator if there is one, each process of `torchrun` or `accelerate launch`
                its own, else the CPU.
            merge_adapter: Add a loaded adapter into its base's weights. Decodes faster, but the sum is rounded to the
                weights' 16 bits, so scores move a little against the unmerged adapter. No effect on a full model.
            revision: Branch, tag or commit of the model on the hub; the newest on its main branch by default.

        Raises:
            ValueError: `batch_size` or `batch_tokens` below 1; `dtype`, `device`, `merge_adapter` or `revision` given
                with a loaded model; an encoder-decoder; no tokenizer to be found; an adapter that names no base.
        """
        for name, value in {"batch_size": batch_size, "batch_tokens": batch_tokens}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
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
                    "dtype, device, merge_adapter and revision work only for models that the backend loads itself, but "
                    "this model is already loaded. Convert, move or merge it before you pass it"
                )
            origin = str(model.config.name_or_path)
            self.model = model
            self.model_id = f"{origin or type(model).__name__} (loaded)"
            if tokenizer is None and not origin:
                raise ValueError("the loaded model has no name or path. Pass its tokenizer as well")
            self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(origin)
        if self.model.config.is_encoder_decoder:
            raise ValueError(f"{self.model_id} is an encoder-decoder model. Only causal language models can be used")
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self._tree: KeyValueTree | None = None  # while something may be asked again
        self._shares: bool | None = None  # until it is asked
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

        Only the settings given here apply. The checkpoint's own generation settings (top-k, penalties, suppressed
        tokens) are ignored, except for its end-of-sequence tokens. The repetition penalty includes the prompt's tokens.
        A text depends on its prompt and seed, but not on other prompts, up to rounding in the batch.

        Prompts with a common prefix share its computation. Longest prompts run first, and a finished text is replaced
        in the batch immediately.
        """
        settings = Sampling(**sampling)
        settings.check(n, stop)
        rows = self._checked(prompts, "prompts")
        seeds = prompt_seeds(seed, len(rows))
        results: list[list[Generation]] = [[] for _ in rows]
        pending: deque[Continuation] = deque()
        texts: list[list[Continuation]] = [[] for _ in rows]
        for prompt, ids in enumerate(rows):
            left = math.inf if self._context is None else self._context - len(ids)
            if left < 2:
                results[prompt] = [Generation("", "prompt_too_long", 0)] * n
                continue
            limit = int(min(settings.max_new_tokens, left))
            for sample in range(n):
                texts[prompt].append(Continuation(prompt, ids, random_numbers(seeds[prompt], sample, limit)))
        pending.extend(text for prompt in arranged(rows) for text in texts[prompt])
        _report(on_progress, sum(bool(done) for done in results))
        ending = Ending(self.tokenizer, stop)
        eos = self._eos_ids()
        doubted: list[Continuation] = []
        missing = [n] * len(rows)

        def finished(some: Sequence[Continuation]) -> None:
            doubted.extend(text for text in some if text.doubt is not None)
            done = [text for text in some if text.doubt is None]
            for text in done:
                missing[text.prompt] -= 1
            _report(on_progress, sum(not missing[prompt] for prompt in {text.prompt for text in done}))

        keeps, drawing, room = self._tree is not None, Drawing(settings), self._room()

        def write(batch: list[Continuation]) -> list[Continuation]:
            write_with_generate(self.model, batch, drawing, ending, eos, self._pad_id())
            finished([text for text in batch if not text.goes_on])
            return [text for text in batch if text.goes_on]

        with self._remembering(self.batch_tokens // 8), self._borrowed_model():
            tree = self._shared_tree()
            while pending:
                if tree is not None:
                    Decoding(self._forward(), tree, room, drawing, ending, eos, keeps=keeps).run(pending, finished)
                else:
                    room.in_batches(pending, write, lambda text: len(text.before) + text.room, self._forget)
                settled = list(doubted)
                doubted.clear()
                self._settle(settled, ending)
                pending.extend(text for text in settled if text.goes_on)
                finished([text for text in settled if not text.goes_on])
        for prompt, some in enumerate(texts):
            for text in some:
                at_eos = bool(text.written) and text.written[-1] in eos
                results[prompt].append(ending.finish(text.written, at_eos=at_eos, taken=text.taken))
        return results

    def next_token_logprobs(
        self, token_id_lists: Sequence[Sequence[int]], token_ids: Sequence[int]
    ) -> NDArray[np.float64]:
        """Log-probabilities of `token_ids` as the next token; see `Backend.next_token_logprobs`.

        Runs the model's own forward pass, including any capping or scaling of logits. Head and softmax are computed in
        float32. Rows with a common prefix share its computation.
        """
        rows = self._checked(token_id_lists, "token_id_lists")
        (wanted,) = self._checked([token_ids], "token_ids")
        logprobs = np.full((len(rows), len(wanted)), np.nan)

        def ask(batch: list[list[int]], tree: KeyValueTree | None) -> torch.Tensor:
            last = whole_rows(self.model, batch, self._pad_id()) if tree is None else self._forward().last(batch, tree)
            # Softmax over all of V first: gathering before it would renormalise over the tokens asked for.
            return last.to(torch.promote_types(last.dtype, torch.float32)).log_softmax(dim=-1)[:, wanted]

        self._ask(rows, 0, ask, logprobs)
        return logprobs

    def trie_logprobs(self, token_id_lists: Sequence[Sequence[int]], trie: TokenTrie) -> NDArray[np.float64] | None:
        """Log-probabilities of complete scores, in one forward pass per batch; see `Backend.trie_logprobs`.

        The trie's inner nodes are appended as branches; see `branches.py`. A row that does not fit into the context
        window with its branches is NaN. Returns None if the model does not support branches.
        """
        rows = self._checked(token_id_lists, "token_id_lists")
        owner = innermost(self.model)
        if self._takes_branches is None:
            refusal = why_not_one_forward(owner)
            self._takes_branches = refusal is None
            if refusal is not None:
                logger.warning("scores of several tokens are computed token by token: %s", refusal)
        if not self._takes_branches or "logits_to_keep" not in inspect.signature(owner.forward).parameters:
            return None
        logprobs = np.full((len(rows), len(trie.paths)), np.nan)

        def ask(batch: list[list[int]], tree: KeyValueTree | None) -> torch.Tensor:
            if tree is None:
                logits = branched(self.model, batch, trie, self._pad_id())
            else:
                logits = self._forward().nodes(batch, tree, trie)
            return trie_logprobs(logits[:, 0], logits[:, 1:], trie)

        self._ask(rows, len(trie.nodes[-1]), ask, logprobs)
        return logprobs

    @contextmanager
    def reuse(self) -> Iterator[None]:
        """Keep keys and values of what is computed inside, and go on from them; see `Backend.reuse`."""
        with self._remembering(self.batch_tokens):
            yield

    @contextmanager
    def _remembering(self, most: int) -> Iterator[None]:
        """Have a tree that holds `most` tokens for long, if there is none yet."""
        if self._tree is not None:
            yield
            return
        self._tree = KeyValueTree(most)
        try:
            yield
        finally:
            self._tree = None

    def _shared_tree(self) -> KeyValueTree | None:
        """The tree of the call under way; None where the model's keys and values cannot be shared."""
        if self._shares is None:
            refusal = why_not_shared(self.model, self._pad_id())
            self._shares = refusal is None
            if refusal is not None:
                logger.warning("shared prefixes of prompts are not reused: %s", refusal)
        return self._tree if self._shares else None

    def _forget(self) -> None:
        if self._tree is not None:
            self._tree.shrink()

    def _forward(self) -> Forward:
        return Forward(self.model, self._pad_id())

    def _room(self) -> Room:
        return Room(self.batch_size, self.batch_tokens)

    def _ask(
        self,
        rows: Sequence[list[int]],
        beyond: int,
        ask: Callable[[list[list[int]], KeyValueTree | None], torch.Tensor],
        answers: NDArray[np.float64],
    ) -> None:
        """Ask for log-probabilities behind rows, in batches, and write them into `answers`.

        Args:
            beyond: Tokens that the context window has to hold behind a row.
            ask: A batch's, `(B, K)`.
            answers: `(len(rows), K)`; stays as it is where a row does not fit.
        """
        window = self._context
        fitting = [row for row in range(len(rows)) if window is None or len(rows[row]) + beyond <= window]
        room = self._room()
        with self._remembering(self.batch_tokens // 8), self._borrowed_model(), exact_head(self.model):
            tree = self._shared_tree()
            order = [fitting[place] for place in arranged([rows[row] for row in fitting])]
            if tree is not None:  # first those that are known, before others take their place
                order.sort(key=lambda row: 2 * tree.length(rows[row]) < len(rows[row]))

            def step(batch: list[int]) -> list[int]:
                asked = [rows[row] for row in batch]
                if tree is not None:
                    self._forward().learn([row[:-1] for row in asked], tree, room.fits, whole=False)
                answers[batch] = ask(asked, tree).double().cpu().numpy()
                if tree is not None:
                    tree.trim()
                return []

            room.in_batches(deque(order), step, lambda row: len(rows[row]) + beyond, self._forget)

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

    def _settle(self, doubted: Sequence[Continuation], ending: Ending) -> None:
        """Ask whether a score was to be expected where something else was sampled; where none was, the text goes on."""
        if not doubted or ending.stop is None:
            return
        rows = [each.prompt_ids + each.written[: each.doubt[1].count] for each in doubted if each.doubt is not None]
        masses = np.exp(self.next_token_logprobs(rows, sorted(set(ending.stop.begins)))).sum(axis=1)
        for each, mass in zip(doubted, masses, strict=True):
            each.settle(float(mass), LEAST_MASS)

    @contextmanager
    def _borrowed_model(self) -> Iterator[None]:
        """The model in evaluation mode and without its checkpoint's sampling settings; both are put back."""
        owner = innermost(self.model)
        head = owner.get_output_embeddings()
        hook = None if head is None else head.register_forward_pre_hook(_contiguous)
        checkpoint_settings = owner.generation_config
        try:
            # Set aside rather than overridden: fields such as `suppress_tokens` have no neutral value to pass.
            owner.generation_config = no_settings()
            with evaluating(self.model):
                yield
        finally:
            owner.generation_config = checkpoint_settings
            if hook is not None:
                hook.remove()

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


def _contiguous(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Hidden states without gaps between rows; a slice of whole sequences has gaps.

    With them, torch multiplies by a frozen weight, such as the head under an adapter, in batches. On a CPU that copies
    the weight for each row.
    """
    # Not `contiguous()`: of a single row it keeps the strides, which are what torch looks at.
    return tuple(each.clone(memory_format=torch.contiguous_format) for each in inputs)


def _report(on_progress: Callable[[int], None] | None, finished: int) -> None:
    if on_progress is not None and finished:
        on_progress(finished)
