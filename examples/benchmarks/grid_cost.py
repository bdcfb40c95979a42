"""What does a score grid cost, from 5 scores to 1,001?

Three ways to the same loss and gradients, on the same rows and random weights:

- `single`: TRACTTrainer on a grid of five single tokens, which is what every other size is compared with;
- `trie`: TRACTTrainer on the grid, its trie's nodes appended to the one forward pass;
- `per_score`: the plain way, one forward pass for each score (up to `--per-score-up-to` scores);

and of a judge's question: the grid's probabilities behind given rationales, for `single`, for `trie` in one forward
pass, and for the `walk` over the trie that works with every backend. Digits are one token each.

    python examples/benchmarks/grid_cost.py --smoke                      # seconds: does it run?
    python examples/benchmarks/grid_cost.py --plot grid-cost.png         # a CPU: tens of minutes
    python examples/benchmarks/grid_cost.py --replot saved.txt --plot grid-cost.png

The ways alternate in one process; a ratio is taken inside a round, and what is reported is the median of the rounds'
ratios with their spread. On a CPU the process's own CPU seconds are counted, which other work on the machine moves less
than the clock. Memory is the most that torch's allocator had live at once beyond what was live before, in one step of
each. A markdown table grows on stdout; the last line is JSON with device, versions, arguments and rows.
"""

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import WORDS, Cell, make_model
from contenders import make_rows as make_word_rows
from datasets import Dataset
from step_cost import conditions, peak_bytes, spread, synchronise
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_tract import CoTRAILJudge, TRACTConfig, TRACTTrainer, TransformersBackend
from trl_tract.scale.decisions import expected_score
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.trie import walk_trie

GRIDS: dict[int, list[float]] = {
    5: [0, 1, 2, 3, 4],
    11: list(range(11)),
    21: [i / 2 for i in range(21)],
    51: list(range(51)),
    101: list(range(101)),
    201: [i / 2 for i in range(201)],
    501: list(range(501)),
    1001: list(range(1001)),
}
SMOKE = {"shape": "tiny", "vocab": 512, "length": 48, "grids": [5, 11, 101], "rounds": 2, "per_score_up_to": 11}
MARKER = "[RESULT]"
MIB = 2**20


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and one a digit."""
    vocab = {word: i for i, word in enumerate(["<end>", MARKER, ".", *"0123456789", *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(".", "isolated")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), digits])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_rows(args: argparse.Namespace, grid: ScoreGrid) -> list[dict[str, str]]:
    """Judge rows of about `--length` tokens, each ending in a score of the grid."""
    rows = make_word_rows(args.batch, args.length, 0.25)
    for i, row in enumerate(rows):
        row["completion"] = row["completion"].split(MARKER)[0] + f"{MARKER} {grid.texts[-1 - i % len(grid)]}"
    return rows


def per_score_loss(model: Any, tokenizer: Any, grid: ScoreGrid, rows: list[dict[str, str]]) -> torch.Tensor:
    """Squared error of the expected score, from one forward pass for each score."""
    values = torch.tensor(grid.values, device=model.device)
    probs = []
    for text in grid.texts:
        texts = [row["prompt"] + row["completion"].split(MARKER)[0] + f"{MARKER} {text}<end>" for row in rows]
        ids = torch.tensor(tokenizer(texts)["input_ids"], device=model.device)  # one length: only the score differs
        count = len(tokenizer(text)["input_ids"]) + 1
        logprobs = model(ids, use_cache=False, logits_to_keep=count + 1).logits.float().log_softmax(-1)
        steps = logprobs[:, :-1].gather(-1, ids[:, -count:, None])[..., 0]  # (B, count)
        ends = any(other.startswith(text) and other != text for other in grid.texts)
        probs.append(steps[:, : count if ends else count - 1].sum(dim=-1).exp())
    golds = torch.tensor([grid.value_of(row["completion"].split()[-1]) for row in rows], device=model.device)
    return (expected_score(torch.stack(probs, dim=-1), values) - golds).square().mean()


def seconds(step: Callable[[], Any], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronise()
    start = clock()
    step()
    synchronise()
    return clock() - start


def train_step(trainer: TRACTTrainer, batch: dict[str, Any]) -> float:
    trainer.current_gradient_accumulation_steps = 1
    samples, num_items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    loss = trainer.training_step(trainer.model, samples[0], num_items)
    trainer.model.zero_grad()
    return loss.item()


def make_trainer(args: argparse.Namespace, grid: ScoreGrid, folder: str) -> tuple[TRACTTrainer, dict[str, Any]]:
    config = TRACTConfig(
        folder,
        score_values=list(grid.values),
        score_marker=MARKER,
        rationale_weight=0.0,
        per_device_train_batch_size=args.batch,
        use_cpu=args.device == "cpu",
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_length=None,
    )
    trainer = TRACTTrainer(
        model_of(args),
        config,
        train_dataset=Dataset.from_list(make_rows(args, grid)),
        processing_class=make_tokenizer(),
    )
    return trainer, next(iter(trainer.get_train_dataloader()))


def model_of(args: argparse.Namespace) -> Any:
    # Room for the scores' tokens and the branches' positions behind the rows.
    cell = Cell(args.shape, args.vocab, args.length + 16, args.batch, 0.25, True, True, False, args.device, args.dtype)
    return make_model(cell)


def measure(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """One size of grid: losses, and the ratios of the ways within each round."""
    grid, five = ScoreGrid.from_values(GRIDS[size]), ScoreGrid.from_values(GRIDS[5])
    with tempfile.TemporaryDirectory() as folder:
        single, trie = (make_trainer(args, each, folder) for each in (five, grid))
        rows, tokenizer, plain = make_rows(args, grid), make_tokenizer(), model_of(args)

        def per_score() -> float:
            plain.train()
            loss = per_score_loss(plain, tokenizer, grid, rows)
            loss.backward()
            plain.zero_grad()
            return loss.item()

        train: dict[str, Callable[[], float]] = {
            "single": functools.partial(train_step, *single),
            "trie": functools.partial(train_step, *trie),
        }
        if size <= args.per_score_up_to:
            train["per_score"] = per_score
        backend = TransformersBackend(plain, tokenizer, batch_size=args.batch)
        prompts = [row["prompt"] for row in rows]
        rationales = [row["completion"].split(MARKER)[0] for row in rows]
        asked = [CoTRAILJudge(backend, score_values=each.values, score_marker=MARKER) for each in (five, grid)]
        ask: dict[str, Callable[[], Any]] = {
            name: functools.partial(judge.score_rationales, prompts, rationales)
            for name, judge in zip(("single", "trie"), asked, strict=True)
        }
        resolved = trie[0].scales[0].grid
        if resolved.paths and size <= args.walk_up_to:
            prefixes = [list(tokenizer(p + r + MARKER)["input_ids"]) for p, r in zip(prompts, rationales, strict=True)]
            ask["walk"] = lambda: walk_trie(
                resolved.trie, prefixes, backend.next_token_logprobs, resolved.values, least_share=0
            )
        losses = {name: step() for name, step in train.items()}  # the warm-up
        for step in ask.values():
            step()
        result: dict[str, Any] = {
            "scores": size,
            "extra_tokens": len(resolved.trie.nodes) - 1 if resolved.paths else 0,
            "loss": losses,
        }
        for kind, ways in (("train", train), ("ask", ask)):
            orders = itertools.islice(itertools.cycle(itertools.permutations(ways)), args.rounds)
            times = [{name: seconds(ways[name], args.device) for name in order} for order in orders]
            result[f"{kind}_seconds"] = {name: spread([each[name] for each in times]) for name in ways}
            result[f"{kind}_over_single"] = {
                name: spread([each[name] / each["single"] for each in times]) for name in ways if name != "single"
            }
            result[f"{kind}_peak_bytes"] = {name: peak_bytes(ways[name], args.device) for name in ("single", "trie")}
    return result


HEADER = ["scores", "more tokens", "training: trie / single", "per score / single"]
HEADER += ["judging: one forward / single", "walk / single", "training, MiB", "judging, MiB"]


def table_row(row: dict[str, Any]) -> str:
    def shown(kind: str, name: str) -> str:
        ratio = row[f"{kind}_over_single"].get(name)
        return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "-"

    cells = [f"{row['scores']:,}", str(row["extra_tokens"]), shown("train", "trie"), shown("train", "per_score")]
    cells += [shown("ask", "trie"), shown("ask", "walk")]
    cells += [f"{row[f'{kind}_peak_bytes']['trie'] / MIB:.1f}" for kind in ("train", "ask")]
    return "| " + " | ".join(cells) + " |"


def draw(result: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (*axes, memory) = pyplot.subplots(1, 3, figsize=(15, 4))
    axes[1].sharey(axes[0])
    names = {
        "train": {"trie": "one forward, branches", "per_score": "one forward a score"},
        "ask": {"trie": "one forward, branches", "walk": "walk, level by level"},
    }
    for axis, (kind, title) in zip(
        axes, {"train": "A training step", "ask": "A judge's question"}.items(), strict=True
    ):
        for name, label in names[kind].items():
            found = [(row["scores"], row[f"{kind}_over_single"][name]) for row in result["rows"]
                     if name in row[f"{kind}_over_single"]]  # fmt: skip
            middle = [ratio["median"] for _, ratio in found]
            bars = [[m - r["min"] for m, (_, r) in zip(middle, found, strict=True)],
                    [r["max"] - m for m, (_, r) in zip(middle, found, strict=True)]]  # fmt: skip
            axis.errorbar([size for size, _ in found], middle, bars, marker="o", capsize=3, label=label)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=title, xlabel="scores in the grid", xscale="log", yscale="log")
        axis.legend()
    axes[0].set_ylabel("time, in units of five single tokens")
    sizes = [row["scores"] for row in result["rows"]]
    for kind, label in {"train": "a training step", "ask": "a judge's question"}.items():
        peaks = [row[f"{kind}_peak_bytes"]["trie"] / MIB for row in result["rows"]]
        memory.plot(sizes, peaks, marker="o", label=f"{label}, one forward")
    memory.set(title="Memory", xlabel="scores in the grid", ylabel="peak beyond what was live, MiB", xscale="log")
    memory.set_ylim(0)
    memory.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", help="of `contenders.SHAPES`")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--length", type=int, default=256, help="tokens a row, about")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--grids", type=int, nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--per-score-up-to", type=int, default=21, help="scores of the largest grid that it is run for")
    parser.add_argument("--walk-up-to", type=int, default=101, help="likewise, of the walk")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--plot", help="file to draw to")
    parser.add_argument("--replot", help="saved output to draw from, instead of measuring")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.replot:
        draw(json.loads(Path(args.replot).read_text().splitlines()[-1]), args.plot)
        return
    result = conditions("grid_cost", args) | {"rows": []}
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER), flush=True)
    for size in args.grids:
        result["rows"].append(measure(args, size))
        print(table_row(result["rows"][-1]), flush=True)
    if args.plot:
        draw(result, args.plot)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
