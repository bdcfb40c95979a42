"""Sharded weights take the step of whole ones: FSDP2, and DeepSpeed ZeRO-3 where it is installed, on two CPU ranks.

Both shard the output head outside the model's forward pass.
"""

import importlib.util
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import make_model, make_rows, make_tokenizer, make_trainer, sharing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"
TOKENIZER = make_tokenizer()
# 8 rows pack into sequences of 2, 2, 3 and 1 scores, all of them in one update: 5 scores on one rank, 3 on the other.
# The learning rate makes that update large against the rounding of the weights.
SETTINGS = {"packing": True, "max_length": 128, "train_sampling_strategy": "sequential", "learning_rate": 5.0}
ALONE = {"per_device_train_batch_size": 4}
A_RANK = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
# Without the threshold the small weights of a tiny model would stay whole.
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
CASES = (
    "own head",
    "tied embeddings",
    "scores of several tokens",
    "further forward passes",
    "several aspects",
    "shared prompts",
)


def start(name: str) -> Any:
    model = make_model(std=0.05)
    model.config.tie_word_embeddings = name == "tied embeddings"
    model.tie_weights()
    return model


def scores_of(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Eight rows, and the grid that they are scored on."""
    rows = make_rows(8)
    if name == "shared prompts":
        return sharing(rows, each=2), {"share_prompts": True}
    if name in ("scores of several tokens", "further forward passes"):
        # Half points: 3 is the beginning of 3.5, and the end of the row tells them apart.
        return rows, {"score_values": [half / 2 for half in range(2, 11)]}
    if name == "several aspects":
        # One token on the first grid, one or several on the second.
        for row in rows:
            gold = row.pop("score")
            row["completion"] = f" so [TONE] {row['completion'][-1]}\nit{row['completion']}"
            row["scores"] = {"tone": gold, "all": gold}
        halves = {"marker": "[RESULT]", "values": [half / 2 for half in range(2, 11)]}
        return rows, {"aspects": {"tone": {"marker": "[TONE]"}, "all": halves}}
    return rows, {}


def trainer_on(output_dir: Path, name: str, model: Any = None, **settings: Any) -> Any:
    rows, grid = scores_of(name)
    settings = {**SETTINGS, "max_steps": 1, **grid, **settings}
    with pytest.MonkeyPatch.context() as patch:
        if name == "further forward passes":
            # As where the attention takes no mask: a pass for each branch, and the ranks have unequal numbers of them.
            patch.setattr("trl_tract.training.trainer.why_not_one_forward", lambda model: "it was told not to")
        return make_trainer(output_dir, rows, model=model or start(name), tokenizer=TOKENIZER, **settings)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


def gradients(trainer: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of the one update, and the number of scores that this rank saw."""
    steps = trainer.args.gradient_accumulation_steps
    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), steps, trainer.args.device)
    trainer.model.train()
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items).backward()
    found = {name: whole(parameter.grad) for name, parameter in trainer.model.named_parameters()}
    return found, sum(int(batch["score_labels"].isfinite().sum()) for batch in batches)


def assert_same_step(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, step in wanted.items():
        assert step.norm() > 0, name
        assert (found[name] - step).norm() <= 1e-5 * step.norm(), name


def change(after: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    before = weights(start(name))
    return {key: weight - before[key] for key, weight in after.items()}


def gradients_under_fsdp2(output: Path, name: str) -> tuple[dict[str, torch.Tensor], int]:
    """By hand, as in torch's manual: every layer, then the root with what is left, the head among it."""
    trainer = trainer_on(output, name, **A_RANK)
    mesh = init_device_mesh("cpu", (2,))
    for layer in trainer.model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(trainer.model, mesh=mesh, reshard_after_forward=True)
    return gradients(trainer)


def step_under_fsdp2(output: Path, name: str) -> dict[str, torch.Tensor]:
    """By accelerate, which puts norm and head in a unit of their own."""
    trainer = trainer_on(output, name, **A_RANK)
    # On CPUs it runs DDP, whatever it is asked for (AcceleratorState.__init__): it is told once it has decided.
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
    trainer.train()
    assert all(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
    return weights(trainer.model)


def steps_under_zero3(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    import deepspeed

    # A sum for inference, which it would compile first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found = {}
    # All models first: once a config asks for ZeRO-3, transformers shards whatever it makes.
    for name, model in {name: start(name) for name in CASES}.items():
        trainer = trainer_on(output, name, model, deepspeed=ZERO3, **A_RANK)
        trainer.train()
        assert not any(parameter.numel() for parameter in trainer.model.parameters())
        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            found[name] = weights(trainer.model)
    return found


@pytest.fixture(scope="module")
def zero3(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """Weights after one step, by name of the model."""
    with processes.two_ranks() as ranks:  # of its own: ZeRO-3 leaves its marks on transformers
        return ranks(steps_under_zero3, tmp_path_factory.mktemp("zero3"))[0]


@pytest.fixture(scope="module", params=CASES)
def alone(request, tmp_path_factory) -> tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Name of the model, its gradients, and what one step does to its weights, in one process with whole weights."""
    name = request.param
    output = tmp_path_factory.mktemp("alone")
    wanted, num_scores = gradients(trainer_on(output, name, **ALONE))
    assert num_scores == (16 if name == "several aspects" else 8)
    trainer = trainer_on(output, name, **ALONE)
    trainer.train()
    return name, wanted, change(weights(trainer.model), name)


@pytest.mark.process
def test_fsdp2_gives_the_gradients_of_whole_weights(tmp_path, two_ranks, alone):
    name, wanted, _ = alone
    ranks = two_ranks(gradients_under_fsdp2, tmp_path, name)
    # Rows with two scores and rows with other prompts are of other lengths, and pack into other sequences.
    scores = {"several aspects": [8, 8], "shared prompts": [4, 4]}.get(name, [5, 3])
    assert [num_scores for _, num_scores in ranks] == scores
    for found, _ in ranks:
        assert_same_step(found, wanted)


@pytest.mark.process
def test_training_under_fsdp2_takes_the_step_of_whole_weights(tmp_path, two_ranks, alone):
    name, _, wanted = alone
    for after in two_ranks(step_under_fsdp2, tmp_path, name):
        assert_same_step(change(after, name), wanted)


@pytest.mark.process
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)
def test_training_under_zero3_takes_the_step_of_whole_weights(zero3, alone):
    name, _, wanted = alone
    assert_same_step(change(zero3[name], name), wanted)


@pytest.mark.parametrize(
    ("name", "kind", "section"),
    [("ddp", "MULTI_GPU", {}), ("fsdp2", "FSDP", {"fsdp_version": 2}), ("zero3", "DEEPSPEED", {"zero_stage": 3})],
)
def test_accelerate_knows_every_line_of_the_example_configs(name, kind, section):
    file = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, 2, "bf16")
    # accelerate checks the names at the top alone; those below become options of its launcher.
    below = config.fsdp_config | config.deepspeed_config
    options = vars(launch_command_parser().parse_args(["train.py"]))
    assert below.keys() <= options.keys()
    assert section.items() <= below.items()
    assert f"accelerate launch --config_file examples/accelerate/{name}.yaml" in file.read_text()
