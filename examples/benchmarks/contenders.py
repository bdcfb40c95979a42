"""Three trainers on one set of weights, and a step of each. Knows nothing of clocks, peaks or tables."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from trl_tract import TRACTConfig, TRACTTrainer

# Hidden units, units between, layers, heads, heads of keys and values.
SHAPES = {
    "tiny": (32, 64, 2, 4, 4),
    "tenth": (576, 1536, 3, 9, 3),  # SmolLM2-135M's width, a tenth of its layers
    "small": (576, 1536, 8, 9, 3),  # SmolLM2-135M's width, 8 of its 30 layers
    "1b": (2048, 8192, 16, 32, 8),  # Llama-3.2-1B
}
SCORES = ["1", "2", "3", "4", "5"]
TEXT = (
    "the reply is polite and answers what was asked but it gives no reason for its second claim and leaves the reader "
    "to guess which of the two offers still holds so the tone is right and the content is not yet complete"
)
WORDS = TEXT.split()


class FullLogitsTrainer(Trainer):
    """The loss of TRACTTrainer with its default weights, from float32 logits of every position, `(B, L, V)`."""

    def __init__(self, *args: Any, grid_ids: Sequence[int], grid_values: Sequence[float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grid_ids = list(grid_ids)
        self.grid_values = torch.tensor(grid_values, device=self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        # The labels are shifted, not the logits: a slice of those would be copied.
        labels = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # (B, L)
        gold = functional.pad(inputs["score_labels"][:, 1:], (0, 1), value=math.nan)  # (B, L)
        scored = ~gold.isnan()
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits.float()
        # Before the cross-entropy, so that autograd reaches it last: one (B, L, V) gradient less at the peak.
        probs = logits[scored].softmax(-1)[:, self.grid_ids]  # (S, K)
        squared_error = (probs @ self.grid_values - gold[scored]).square()
        nll = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return nll / num_items_in_batch + squared_error.mean()


@dataclass(frozen=True)
class Cell:
    """One set of sizes, with everything that a step of it needs."""

    shape: str
    vocab: int
    length: int
    batch: int
    completion_share: float
    tied: bool
    checkpointing: bool
    same_positions: bool  # `sft` leaves the prompt out of its head on a CPU too, `tract` keeps the score's label
    device: str
    dtype: str


@dataclass(frozen=True)
class Contenders:
    """A step of each trainer by its name (`sft`, `tract`, `full`): does it, and returns its loss."""

    steps: dict[str, Callable[[], float]]
    tokens: int
    labelled_tokens: int
    scores: int
    resident_bytes: int  # weights and the optimizer's state


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, so that a row has exactly as many tokens as it is asked to have."""
    vocab = {word: i for i, word in enumerate(["<end>", "[RESULT]", *SCORES, *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_rows(batch: int, length: int, completion_share: float) -> list[dict[str, str]]:
    """Judge rows of `length` tokens each, of which `completion_share` are rationale, marker, score and end."""
    prompt_length = min(max(length - round(length * completion_share), 1), length - 4)
    rows = []
    for i in range(batch):
        words = list(itertools.islice(itertools.cycle(WORDS), i, i + length - 3))
        rationale = " ".join(words[prompt_length:])
        completion = f" {rationale} [RESULT] {SCORES[i % len(SCORES)]}"
        rows.append({"prompt": " ".join(words[:prompt_length]), "completion": completion})
    return rows


def make_model(cell: Cell) -> LlamaForCausalLM:
    hidden, between, layers, heads, key_value_heads = SHAPES[cell.shape]
    config = LlamaConfig(
        vocab_size=cell.vocab,
        hidden_size=hidden,
        intermediate_size=between,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=cell.length,
        tie_word_embeddings=cell.tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(cell.device):
        model = LlamaForCausalLM(config).to(getattr(torch, cell.dtype))
    if cell.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def make_contenders(cell: Cell, folder: str) -> Contenders:
    """The trainers, each with a batch of the same rows from its own data path, after the optimizer's first step.

    The models are three, because trainers patch a model's forward, but their parameters are the same objects and one
    optimizer serves all. A learning rate of 0 keeps the weights as they are, at the full price of a step.
    """
    model = make_model(cell)
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": cell.batch,
        "learning_rate": 0.0,
        "use_cpu": cell.device == "cpu",
        "bf16": False,  # no autocast: the weights have the type that was asked for
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    rows = Dataset.from_list(make_rows(cell.batch, cell.length, cell.completion_share))
    common = {"train_dataset": rows, "processing_class": make_tokenizer()}
    sft = SFTTrainer(copy.deepcopy(model, dict(parameters)), SFTConfig(**settings, max_length=None), **common)
    tract_config = TRACTConfig(**settings, max_length=None, score_in_ce=cell.same_positions)
    tract = TRACTTrainer(copy.deepcopy(model, dict(parameters)), tract_config, **common)
    grid = tract.scales[0].grid
    full = FullLogitsTrainer(model, TrainingArguments(**settings), grid_ids=grid.token_ids, grid_values=grid.values)
    sft_batch, batch = (next(iter(trainer.get_train_dataloader())) for trainer in (sft, tract))
    optimizer = sft.create_optimizer()

    def step(trainer: Trainer, batch: dict[str, Any]) -> float:
        trainer.current_gradient_accumulation_steps = 1
        samples, num_items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
        loss = trainer.training_step(trainer.model, samples[0], num_items)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def sft_step() -> float:
        use_triton = trl.trainer.utils._use_triton
        if cell.same_positions:
            # TRL's fused head asks this whether to leave out what has no label; its arithmetic asks elsewhere.
            trl.trainer.utils._use_triton = lambda device: True
        try:
            return step(sft, sft_batch)
        finally:
            trl.trainer.utils._use_triton = use_triton

    sft_step()  # the optimizer makes its state in its first step
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return Contenders(
        steps={"sft": sft_step, "tract": lambda: step(tract, batch), "full": lambda: step(full, batch)},
        tokens=batch["input_ids"].numel(),
        labelled_tokens=int((batch["labels"] != -100).sum()),
        scores=int((~batch["score_labels"].isnan()).sum()),
        resident_bytes=sum(tensor.nbytes for tensor in [*parameters.values(), *state]),
    )
