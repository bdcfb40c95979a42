"""What does a step of REALTrainer cost beside one of GRPOTrainer whose reward makes one forward pass of the same model?

Both are given the same rationales, since writing them is the same work in both: what is timed is rewards, loss and
gradients, and the optimizer's step. GRPOTrainer's reward is a black box that runs the model once over prompt and
rationale without gradient, and returns a number for each. `shared` is REALTrainer with `share_prompts`.

On a CPU TRL's fused head also scores the prompt, which REALTrainer leaves out, as both do on a GPU. With
`--same-positions` it does not, and what is left is what REALTrainer itself costs.

The contenders alternate in one process, in every order in turn; a ratio is taken inside a round, and what is reported
is the median of the rounds' ratios with their spread.

    python examples/benchmarks/real_step.py --smoke                  # seconds, tiny: does it run?
    python examples/benchmarks/real_step.py --rounds 6 --same-positions  # a CPU: SmolLM2's width, three of its layers
    python examples/benchmarks/real_step.py --shape 1b --rounds 12   # a GPU

The last line of stdout is JSON with device, versions, arguments and ratios.
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from trl_tract import REALConfig, REALTrainer

# Hidden, between, layers, heads, heads of keys and values.
SHAPES = {"tiny": (32, 64, 2, 4, 4), "small": (576, 1536, 3, 9, 3), "1b": (2048, 8192, 16, 32, 8)}
NAMES = ["grpo", "real", "shared"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and an end of text: text is made up, and its tokens change nothing of what a step costs."""
    vocab = {token: i for i, token in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    hidden, between, layers, heads, key_value_heads = SHAPES[args.shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=hidden,
        intermediate_size=between,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=args.prompt + args.completion + 64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_trainer(name: str, args: argparse.Namespace, folder: str) -> Any:
    tokenizer, model = make_tokenizer(), make_model(args)
    rows = Dataset.from_list([{"prompt": "is it polite? " * (args.prompt // 14), "score": 3.5}])
    rationale = "it says why " * (args.completion // 12) + "[RESULT]"
    settings: dict[str, Any] = {
        "num_generations": args.group,
        "per_device_train_batch_size": args.group,
        "max_completion_length": args.completion + 16,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "max_steps": 1,
        "disable_tqdm": True,
    }
    if name == "grpo":

        def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            encoded = tokenizer(
                [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
                return_tensors="pt",
                padding=True,
            ).to(model.device)
            with torch.no_grad():
                logits = model(**encoded, logits_to_keep=1).logits
            return [float(number) for number in logits[:, 0, 1]]

        trainer: Any = GRPOTrainer(
            model, reward, GRPOConfig(folder, **settings), train_dataset=rows, processing_class=tokenizer
        )
    else:
        config = REALConfig(folder, **settings, share_prompts=name == "shared")
        trainer = REALTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    ids = tokenizer(rationale)["input_ids"]
    # Unequal endings, so that the group differs.
    trainer._generate_single_turn = lambda prompts, *others, **more: (
        [[*ids[:index], *ids] for index in range(len(prompts))],
        None,
    )
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def step(trainer: Any) -> float:
    """Seconds of rewards, loss, gradients and the optimizer's step."""
    rows = [trainer.train_dataset[0]] * trainer.args.per_device_train_batch_size
    trainer._buffered_inputs = None
    started = time.perf_counter()
    trainer.training_step(trainer.model, rows, None)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--prompt", type=int, default=1000, help="Tokens of the prompt.")
    parser.add_argument("--completion", type=int, default=150, help="Tokens of a rationale.")
    parser.add_argument("--group", type=int, default=8, help="Rationales of the prompt.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--same-positions", action="store_true", help="GRPOTrainer leaves the prompt out of its head on a CPU too."
    )
    parser.add_argument("--smoke", action="store_true", help="Tiny, in seconds.")
    args = parser.parse_args(argv)
    if args.smoke:
        args.shape, args.vocab, args.prompt, args.completion, args.group, args.rounds = "tiny", 512, 60, 24, 4, 2
    # TRL's fused head asks this whether to leave out what has no label; its arithmetic asks elsewhere.
    compact = mock.patch("trl.trainer.utils._use_triton", return_value=True) if args.same_positions else nullcontext()
    with compact, tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(name, args, folder) for name in NAMES}
        for trainer in trainers.values():
            step(trainer)
        orders = itertools.cycle(itertools.permutations(NAMES))
        rounds = [{name: step(trainers[name]) for name in next(orders)} for _ in range(args.rounds)]
    ratios = {}
    print(
        f"| step | seconds, median | of GRPOTrainer's, median (least to most of {args.rounds} rounds) |\n|---|---|---|"
    )
    for name in NAMES:
        own = [each[name] / each["grpo"] for each in rounds]
        ratios[name] = statistics.median(own)
        seconds = statistics.median(each[name] for each in rounds)
        print(f"| {name} | {seconds:.3f} | {ratios[name]:.2f} ({min(own):.2f} to {max(own):.2f}) |")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    versions = {"torch": torch.__version__, "trl": trl.__version__}
    print(json.dumps({"device": device, "versions": versions, "arguments": vars(args), "ratios": ratios}))


if __name__ == "__main__":
    main()
