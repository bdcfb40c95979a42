"""A dry run counts what Trainer would do, says how it estimates, shows rows, and leaves nothing behind."""

import json
import re

import pytest
from conftest import make_model, make_rows, make_tokenizer, make_trainer
from peft import LoraConfig, get_peft_model
from test_aspects import ASPECTS
from test_aspects import make_rows as aspect_rows

from trl_tract.cli import main
from trl_tract.commands.check import examine
from trl_tract.commands.dry_run import Plan, _largest_batch
from trl_tract.commands.estimate import Batch, count, training_memory, training_operations
from trl_tract.files.journal import write_json, write_jsonl
from trl_tract.scale.scales import Scales
from trl_tract.sources.schemas import try_items

BATCH = Batch(rows=2, length=50, labelled=30, score_rows=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(directory)
    make_model().config.save_pretrained(directory)  # no weights: none are needed
    return str(directory)


def run_of(tmp_path, model, *options):
    paths = ["--data", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    return ["run", "--model_name_or_path", model, *paths, "--bf16", "false", *options]


def begin(tmp_path, model, seconds):
    """A directory of a real run, which cannot train since the model has no weights, with these steps finished."""
    write_jsonl(tmp_path / "rows.jsonl", make_rows(12))
    assert main(run_of(tmp_path, model)) == 1
    write_json(tmp_path / "out" / "steps.json", seconds)


def dry(tmp_path, model, rows, capsys, *options, command="run"):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    code = main([command, *run_of(tmp_path, model, "--dry-run", *options)[1:]])
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 4, "num_train_epochs": 3},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 2},
        {"per_device_train_batch_size": 3, "num_train_epochs": 0.5},
        {"per_device_train_batch_size": 4, "max_steps": 5},
    ],
)
def test_updates_are_those_that_trainer_does(settings, tmp_path):
    trainer = make_trainer(tmp_path, make_rows(7), **{**settings, "learning_rate": 0.0})
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    trainer.train()
    assert Plan.of(lengths, trainer.args.to_dict(), 1).updates == trainer.state.global_step


def test_tokens_of_an_update_are_counted():
    plan = Plan.of([10, 20, 30, 40], {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, 1)
    # Two rows of 25 tokens in the mean, or of 40 each.
    assert (plan.rows_per_update, plan.mean_tokens, plan.most_tokens) == (2, 50, 80)
    assert (plan.batch_rows, plan.longest) == (1, 40)


def test_processes_share_the_updates():
    lengths = [10] * 32
    assert [Plan.of(lengths, {"num_train_epochs": 1}, processes).updates for processes in (1, 2, 4)] == [4, 2, 1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "qwen3_moe"])
def test_parameters_are_counted_without_weights(family, tmp_path):
    network = make_model(family)
    network.config.save_pretrained(tmp_path)
    size = count(str(tmp_path), {"dtype": "float32"})
    assert size.total == size.trainable == sum(p.numel() for p in network.parameters())
    assert (size.layers, size.hidden, size.stored) == (2, 32, 4)


def test_of_a_mixture_a_token_meets_the_chosen_experts_alone(tmp_path):
    make_model("qwen3_moe").config.save_pretrained(tmp_path)
    size = count(str(tmp_path), {"dtype": "float32"})
    experts = 2 * 6 * 3 * 32 * 16  # layers, experts, three matrices
    table = 384 * 32
    assert size.active < size.total - table - experts + experts * 2 / 6 + 1


def test_an_adapters_parameters_are_those_that_are_trained(model):
    adapted = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    options = {"dtype": "float32", "use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
    assert count(model, options).trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_memory_of_weights_gradients_and_adam_by_hand(model):
    size = count(model, {"dtype": "float32"})
    memory = training_memory(size, {"optim": "adamw_torch", "gradient_checkpointing": True}, {}, BATCH)
    found = [memory.terms[name] for name in ("weights", "gradients", "optimiser")]
    assert found == [4 * size.total, 4 * size.total, 8 * size.total]


def test_activations_by_hand(model):
    # Two blocks, 32 wide, 4 heads of 8 and as many for the keys or half, 64 in the feed-forward part, 384 tokens.
    size = count(model, {"dtype": "float32"})
    assert (size.hidden, size.inner, size.vocabulary) == (32, make_model().config.intermediate_size, 384)
    tokens, rows, length = 2 * 50, 2, 50
    terms = training_memory(size, {"bf16": True}, {}, Batch(rows, length, labelled=30, score_rows=2)).terms
    assert terms["layer inputs"] == 2 * 2 * tokens * 32
    assert terms["one layer"] == tokens * (18 * 32 + 8 * size.query + 10 * size.key + 14 * size.inner)
    assert terms["mask"] == 3 * rows * length**2
    assert terms["fused head"] == 2 * 384 * 30 + 6 * 30 * 32
    assert terms["score rows"] == 16 * 2 * 384
    everything = training_memory(size, {"gradient_checkpointing": False}, {}, Batch(rows, length, 30, 2)).terms
    assert everything["layers"] == 2 * 2 * terms["one layer"]  # both blocks, in float32


def test_sharded_weights_are_shared_out_and_gathered_two_blocks_at_a_time(model):
    size = count(model, {"dtype": "float32"})
    alone, shared = (training_memory(size, {"bf16": True}, {}, BATCH, devices).terms for devices in (1, 2))
    for name in ("weights", "gradients", "optimiser"):
        assert shared[name] == alone[name] / 2
    assert shared["gathered"] == 2 * (size.embeddings + 2 * size.layer) + 2 * (size.embeddings + size.layer)


def test_four_bits_shrink_the_linear_layers_alone(model):
    size = count(model, {"dtype": "float32"})
    whole, small = (training_memory(size, {}, {"load_in_4bit": four}, BATCH).terms["weights"] for four in (False, True))
    assert whole - small == pytest.approx(size.linear * (4 - 0.5625))


def test_operations_of_full_training_are_six_a_parameter_and_token(model):
    size = count(model, {"dtype": "float32"})
    found = training_operations(size, 1000, 0.0, {"gradient_checkpointing": False})
    assert found == 6 * size.active * 1000


def test_a_dry_run_prints_the_steps_and_writes_nothing(tmp_path, model, capsys):
    code, printed = dry(tmp_path, model, make_rows(12), capsys)
    assert code == 0
    assert re.findall(r"^\[(\d)/7\] (\w+)", printed, re.MULTILINE)[0] == ("1", "Reading")
    assert "11 rows to train on, 1 held-out items" in printed
    assert "Memory of training on one device, an estimate:" in printed
    assert "no step was run" in printed
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_is_finished(tmp_path, model, capsys):
    begin(tmp_path, model, {"prepare": 3.0, "stage1": 61.0})
    printed = dry(tmp_path, model, make_rows(12), capsys)[1]
    assert "[2/7] Stage one: the seed model on the annotated rationales: finished before, in 61 s" in printed
    assert "Self-generation: the stage-one model writes its own rationales\n    11 rationales" in printed
    assert json.loads((tmp_path / "out" / "steps.json").read_text()) == {"prepare": 3.0, "stage1": 61.0}


def test_a_dry_run_says_that_a_directory_would_be_refused(tmp_path, model, capsys):
    begin(tmp_path, model, {"prepare": 3.0, "stage1": 61.0})
    assert main(run_of(tmp_path, model, "--dry-run", "--on_failure", "drop")) == 1
    assert "would be refused: " in (printed := capsys.readouterr().err)
    assert "holds another run (on_failure: 'keep_gold' there, 'drop' now)" in printed


def test_five_rows_are_shown_with_their_terms_of_the_loss(tmp_path, model, capsys):
    printed = dry(tmp_path, model, make_rows(12), capsys, command="train")[1]
    assert len(re.findall(r"^row \d+, gold score", printed, re.MULTILINE)) == 5
    assert re.search(r"^score +1 +squared error", printed, re.MULTILINE)
    assert re.search(r"^rationale +\d+ +cross-entropy", printed, re.MULTILINE)
    assert re.search(r"^prompt +\d+ +none", printed, re.MULTILINE)


@pytest.mark.parametrize(("name", "coloured"), [("FORCE_COLOR", True), ("NO_COLOR", False)])
def test_colour_is_where_it_is_wanted(name, coloured, tmp_path, model, capsys, monkeypatch):
    monkeypatch.setenv(name, "1")
    printed = dry(tmp_path, model, make_rows(12), capsys, command="train")[1]
    assert ("\x1b[1;7;35m" in printed) == coloured


def test_rows_that_would_be_refused_end_a_dry_run_with_1(tmp_path, model, capsys):
    rows = make_rows(12)
    rows[3]["completion"] = " fine. 4"
    code, printed = dry(tmp_path, model, rows, capsys, command="train")
    assert code == 1
    assert "1 of 12 rows.jsonl rows refused (no marker; first: row 3)" in printed


def test_rows_that_may_be_dropped_do_not(tmp_path, model, capsys):
    rows = make_rows(12)
    rows[3]["score"] = 9.0
    assert dry(tmp_path, model, rows, capsys, "--invalid_rows", "drop", command="train")[0] == 0


def test_a_dry_run_of_several_aspects(tmp_path, model, capsys):
    aspects = json.dumps(ASPECTS)
    code, printed = dry(tmp_path, model, aspect_rows(ASPECTS, 12), capsys, "--aspects", aspects)
    assert code == 0
    # 11 training rows with a rationale for each of two aspects.
    assert "22 rationales for 11 prompts" in printed
    (golds,) = re.findall(r"^row 0, gold score ([\d., ]+):", printed, re.MULTILINE)
    assert len(golds.split(", ")) == 2
    assert len(re.findall(r"^score +\d+ +squared error", printed, re.MULTILINE)) >= 10


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_dry_run_says_what_training_would_warn_of(command, tmp_path, model, capsys):
    printed = dry(tmp_path, model, make_rows(12), capsys, "--score_values", "0..100", command=command)[1]
    assert "Training would warn: score_values span 100 rubric units" in printed
    assert "raft_weight=0.0016 gives it the same weight" in printed
    options = ["--score_values", "0..100", "--raft_weight", "0.0016"]
    assert "would warn" not in dry(tmp_path, model, make_rows(12), capsys, *options, command=command)[1]


@pytest.mark.parametrize("scores", [1, 3])
def test_memory_counts_every_score_of_a_row(scores, tmp_path):
    markers = ["[RESULT]", "[B]", "[C]"][:scores]
    rows = [{"prompt": "Judge.", "completion": "".join(f" Fine. {marker} 2" for marker in markers)}] * 12
    training = {"aspects": {marker: {"marker": marker} for marker in markers}} if scores > 1 else {}
    write_jsonl(tmp_path / "rows.jsonl", rows)
    items = try_items(str(tmp_path / "rows.jsonl"), Scales.of(training), only_trained=True)
    report, encoder = examine(enumerate(items), "rows", make_tokenizer(), training)
    assert _largest_batch(Plan.of(report.tokens, {}, 1), report, encoder).score_rows == 8 * scores
