"""`trl-tract merge`: one model of an adapter and its base, and how far that moves its scores."""

from trl_tract.backends import TransformersBackend
from trl_tract.commands.deploying import MergeArguments
from trl_tract.demo.task import make_rows
from trl_tract.judge.judge import CoTRAILJudge
from trl_tract.saved.merging import merge_judge
from trl_tract.scale.decisions import expected_score

_TEXTS = 32


def merge(args: MergeArguments) -> int:
    """Merge, save and compare."""
    before = scores(args.model)
    directory = merge_judge(args.model, args.output_dir, args.dtype)
    differences = [abs(one - other) for one, other in zip(before, scores(str(directory)), strict=True)]
    print(
        f"The merged judge is in {directory}. On {len(differences)} test texts, its scores differ from those of the "
        f"unmerged judge by {sum(differences) / len(differences):.4f} on average and {max(differences):.4f} at most "
        "(rubric units)"
    )
    return 0


def scores(model: str) -> list[float]:
    """Expected scores behind given texts; of several aspects on the first one's scale.

    The texts are the demo's and need not be like those that the judge was trained on: what is compared is arithmetic.
    """
    import torch

    judge = CoTRAILJudge.from_pretrained(model, TransformersBackend(model))
    judge.scales = judge.scales[:1]
    rows = make_rows("eval", _TEXTS)
    prompts = [row["prompt"] if judge.asks_chat else row["prompt"][-1]["content"] for row in rows]
    rationales = [row["completion"][-1]["content"].split("[RESULT]")[0].strip() for row in rows]
    probs = torch.from_numpy(judge.score_rationales(prompts, rationales))
    values = torch.tensor(judge.grid.values, dtype=torch.float64)
    found: list[float] = expected_score(probs, values, normalize=judge.normalize_grid).tolist()
    return found
