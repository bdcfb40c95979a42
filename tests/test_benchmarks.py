"""The benchmarks in `examples/benchmarks` run, measure what they say, and end with a line of JSON."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_seed

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def step_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step_cost

    yield step_cost
    # A folder of scripts: its names should not stay importable.
    for name in ("step_cost", "contenders"):
        sys.modules.pop(name, None)


def test_peak_bytes_counts_what_was_live_at_once(step_cost):
    def step():
        first = torch.empty(1000)  # 4000 bytes
        del first
        second, third = torch.empty(500), torch.empty(750)  # 2000 + 3000 bytes, together
        return second, third

    assert step_cost.peak_bytes(step, "cpu") == 5000


@pytest.fixture
def smoke(step_cost, capsys):
    step_cost.main(["--smoke", "--device", "cpu"])
    return capsys.readouterr().out.splitlines()


def test_smoke_ends_with_a_table_and_json(smoke):
    result = json.loads(smoke[-1])
    assert result["benchmark"] == "step_cost"
    assert {"torch", "transformers", "trl", "trl_tract"} <= result["versions"].keys()
    assert result["device"]
    assert result["arguments"]["rounds"] == 3
    assert [line.split(" | ")[0] for line in smoke[2:-1]] == ["| 512", "| 2048"]
    for row in result["rows"]:
        # 2 rows of 48 tokens: a quarter is completion (12), whose score has no label.
        assert (row["tokens"], row["labelled_tokens"], row["scores"], row["rounds"]) == (96, 22, 2, 3)
        assert row["score_rows_bytes"] == 2 * row["vocab"] * 4
        assert set(row["peak_bytes"]) == set(row["seconds"]) == {"sft", "tract", "full"}
        assert 0 < row["operators"]["sft"] < row["operators"]["tract"]
        assert row["tract_over_sft"]["min"] <= row["tract_over_sft"]["median"] <= row["tract_over_sft"]["max"]
        # The contender from full logits computes the same loss: else its cost would say nothing.
        assert row["loss"]["full"] == pytest.approx(row["loss"]["tract"], rel=1e-5)


def test_same_positions_gives_both_heads_the_same_labels(step_cost, tmp_path):
    from contenders import Cell, make_contenders

    sizes = {"shape": "tiny", "vocab": 512, "length": 48, "batch": 2, "completion_share": 0.25}
    cell = Cell(**sizes, tied=True, checkpointing=True, same_positions=True, device="cpu", dtype="float32")
    # 12 tokens a row: rationale, marker, score and end.
    assert make_contenders(cell, str(tmp_path)).labelled_tokens == 24


def test_full_logits_that_do_not_fit_are_left_out_by_name(step_cost, monkeypatch, capsys):
    monkeypatch.setattr(step_cost, "free_bytes", lambda device: 2**20)
    step_cost.main(["--smoke", "--device", "cpu"])
    printed = capsys.readouterr().out.splitlines()
    # 1.1 x 3 x 96 positions x 2048 tokens x 4 bytes = 2.6 MB, and 0.9 of 1 MiB may be used.
    small, large = json.loads(printed[-1])["rows"]
    assert "full_over_tract" in small
    assert "full_over_tract" not in large
    assert large["full_left_out"] == "needs 0.0 GiB, free 0.0 GiB"


def test_a_saved_output_is_drawn_again(step_cost, smoke, tmp_path):
    (tmp_path / "saved.txt").write_text("\n".join(smoke))
    step_cost.main(["--replot", str(tmp_path / "saved.txt"), "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.fixture
def shared_prompts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import shared_prompts

    yield shared_prompts
    for name in ("shared_prompts", "step_cost", "contenders"):
        sys.modules.pop(name, None)


def test_sharing_is_measured_on_the_same_rows_with_fewer_tokens(shared_prompts, capsys, tmp_path):
    shared_prompts.main(["--smoke", "--device", "cpu"])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result["benchmark"] == "shared_prompts"
    alike, apart = result["rows"]
    # Four rows of 40 + 8 tokens: the prompt once and four completions; where nothing is shared, all of them.
    assert alike["tokens"] == {"separate": 192, "shared": 72}
    assert apart["tokens"] == {"separate": 192, "shared": 192}
    assert alike["peak_bytes"]["shared"] < alike["peak_bytes"]["separate"]
    for row in result["rows"]:
        assert row["loss_difference"] < 1e-5
    (tmp_path / "saved.txt").write_text(printed[-1])
    shared_prompts.main(["--replot", str(tmp_path / "saved.txt"), "--plot", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.fixture
def generation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import generation

    yield generation
    sys.modules.pop("generation", None)


@pytest.fixture
def generation_smoke(generation, capsys):
    generation.main(["--smoke", "--ask", "durable", "samples"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_generation_smoke_ends_with_json(generation_smoke):
    assert generation_smoke["benchmark"] == "generation"
    assert {"torch", "transformers", "trl_tract"} <= generation_smoke["versions"].keys()
    (durable,) = generation_smoke["results"]["durable"]
    assert durable["rationales_per_second"].keys() == {"durable", "bare"}
    for ratio in ("bare_over_durable_in_seconds", "bare_over_durable_in_cpu_seconds"):
        assert durable[ratio]["min"] <= durable[ratio]["median"] <= durable[ratio]["max"]
    assert [row["n"] for row in generation_smoke["results"]["samples"]] == [1, 2]


def test_both_sides_of_the_durable_comparison_write_the_same_number_of_tokens(generation, monkeypatch):
    written = []
    generate = generation.FullLength.generate

    def counted(self, *arguments, **settings):
        sampled = generate(self, *arguments, **settings)
        written.append(sum(one.num_tokens for row in sampled for one in row))
        return sampled

    monkeypatch.setattr(generation.FullLength, "generate", counted)
    generation.main(["--smoke", "--ask", "durable"])
    # 6 prompts of 4 tokens: a warm-up and two rounds of two contenders.
    assert written == [24] * 6


def test_the_prompt_is_computed_once_on_one_side_and_n_times_on_the_other(generation):
    backend = generation.FullLength(None, 2, None)
    backend.generate([[1, 2, 3]], n=2, max_new_tokens=1)  # the first time, whether the model can share is tried out
    computed = []
    backend.model.get_input_embeddings().register_forward_hook(lambda module, args, out: computed.append(out[..., 0]))
    ids = list(range(10)) * 4
    backend.generate([ids], n=2, max_new_tokens=1)
    shared = sum(each.numel() for each in computed)
    computed.clear()
    backend._shares = False
    backend.generate([ids], n=2, max_new_tokens=1)
    assert (shared, sum(each.numel() for each in computed)) == (39 + 2, 80)


@pytest.mark.slow
def test_the_memory_of_a_distillation_is_that_of_its_own_process(generation, capfd):
    generation.main(["--ask", "memory", "--rows", "30"])
    (row,) = json.loads(capfd.readouterr().out.splitlines()[-1])["results"]["memory"]
    assert row["rows"] == 30
    assert 0 < row["imports_bytes"] < row["peak_bytes"]


@pytest.fixture
def grid_cost(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import grid_cost

    grid_cost.main(["--smoke", "--device", "cpu"])
    yield json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("grid_cost", "step_cost", "contenders"):
        sys.modules.pop(name, None)


def test_grid_cost_compares_ways_to_the_same_loss(grid_cost):
    rows = {row["scores"]: row for row in grid_cost["rows"]}
    # 0 to 10: one inner node, "1"; 0 to 100: "1" to "9" and "10".
    assert {size: row["extra_tokens"] for size, row in rows.items()} == {5: 0, 11: 1, 101: 10}
    for size in (5, 11):
        assert rows[size]["loss"]["trie"] == pytest.approx(rows[size]["loss"]["per_score"], rel=1e-5)
    assert rows[101]["train_over_single"].keys() == {"trie"}
    assert rows[101]["ask_over_single"].keys() == {"trie", "walk"}
    for kind in ("train", "ask"):
        peaks = [rows[size][f"{kind}_peak_bytes"] for size in (5, 101)]
        assert 0 < peaks[0]["single"] == peaks[0]["trie"] < peaks[1]["trie"]


@pytest.mark.slow
@pytest.mark.process
def test_rows_memory_measures_each_work_and_size(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rows_memory

    save_seed(tmp_path)
    rows_memory.main(["--model", str(tmp_path), "--rows", "20", "40"])
    sys.modules.pop("rows_memory")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["work"], row["rows"]) for row in result["rows"]] == [
        (work, rows) for work in ("check", "prepare") for rows in (20, 40)
    ]
    assert all(row["peak_bytes"] > 1e8 for row in result["rows"])


def test_stored_work_costs_a_file_a_block(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import blocks

    # Four blocks of 100 rows, the result, finished.json, settings.json, and locks: of the directory, worker and result.
    assert blocks.measure(100, block_size=32)["files"] == 4 + 3 + 3
    sys.modules.pop("blocks")


def test_a_step_of_reinforcement_is_compared_with_one_of_grpo(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real_step

    real_step.main(["--smoke"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["ratios"].keys() == {"grpo", "real", "shared"}
    assert result["ratios"]["grpo"] == 1
    assert all(ratio > 0 for ratio in result["ratios"].values())
    sys.modules.pop("real_step")


@pytest.mark.slow
def test_both_modes_of_thinking_are_trained_and_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import thinking_judge

    save_seed(tmp_path / "model", std=0.02)
    sizes = ["--model", str(tmp_path / "model"), "--rows", "4", "--items", "6"]
    thinking_judge.main(["--output_dir", str(tmp_path / "out"), *sizes])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (seed,) = result["results"]
    assert list(seed["judges"]) == ["off, stage one", "off, TRACT", "rationale, stage one", "rationale, TRACT"]
    assert seed["rationale_minus_off"]["TRACT"].keys() >= {"pearson", "rmse"}
    assert {own["rows"] for own in seed["self_generated"].values()} == {4}
    for mode in ("off", "rationale"):
        config = json.loads((tmp_path / "out" / f"{mode}-0" / "tract" / "tract_config.json").read_text())
        assert config["thinking"] == mode


@pytest.mark.slow
def test_shared_inference_smoke_ends_with_json(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import shared_inference

    sys.modules.pop("shared_inference")
    shared_inference.main(["--smoke", "--ask", "judge"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "shared_inference"
    (row,) = result["rows"]
    assert (row["ask"], row["prompts"], row["rounds"]) == ("judge", 4, 2)
    assert row["now_over_before_in_seconds"]["min"] > 0


def test_loss_on_this_device_is_that_of_full_float64_logits(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_checks
    from contenders import Cell

    for share in (False, True):
        cell = Cell("tiny", 512, 48, 3, 0.25, True, False, False, "cpu", "float32")
        found = gpu_checks.errors(cell, share)
        assert found["loss"] < 1e-6
        assert found["gradient"] < 1e-5
    for name in ("gpu_checks", "contenders"):
        sys.modules.pop(name, None)


def test_parts_that_did_not_finish_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_checks

    (tmp_path / "qlora.txt").write_text('{"bits": 4}\n{"rows": [1]}\n')
    (tmp_path / "step_cost.txt").write_text("| vocabulary |\n")
    gpu_checks.main(["collect", str(tmp_path)])
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts == {"qlora": {"rows": [1]}, "step_cost": {"unfinished": "| vocabulary |"}}
    assert "step_cost: did not finish" in capsys.readouterr().out
    for name in ("gpu_checks", "contenders"):
        sys.modules.pop(name, None)
