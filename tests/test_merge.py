"""`trl-tract merge`: one model of 16 bits that is the same judge, in the form that converters and servers read."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from trl_tract import CoTRAILJudge, TransformersBackend
from trl_tract.cli import main
from trl_tract.rows.tokens import resolve_scales
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.saved.merging import merge_judge
from trl_tract.scale.scale import read_scales

# PEFT warns of adapters with one of two tied embeddings, and this file is about what becomes of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]
TOKENIZER = make_tokenizer()
SCALES = resolve_scales(TOKENIZER, {"prompt": "a", "completion": " b [RESULT] 3"}, read_scales({}))


def adapter(folder, name="llama", dtype=torch.float32, strength=0.05, **lora):
    """A judge adapter whose weights are not those it starts with."""
    base = make_model(name, dtype=dtype)
    base.save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    config = LoraConfig(**{"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM", **lora})
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * strength
    model.save_pretrained(folder / "adapter")
    TOKENIZER.save_pretrained(folder / "adapter")
    JudgeConfig(SCALES).save(folder / "adapter")
    return folder / "adapter"


def probs(judge, dtype=None):
    made = CoTRAILJudge.from_pretrained(judge, TransformersBackend(str(judge), dtype=dtype))
    return made.score_rationales(["is this polite? ->", "a b"], ["so so", "no"])


def weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=lambda lora: "-".join(lora) or "plain",
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # the second ties its embeddings
def test_the_merged_judge_gives_the_probabilities_of_the_adapter(tmp_path, name, lora):
    judge = adapter(tmp_path, name, **lora)
    merged = merge_judge(str(judge), tmp_path / "merged", "bfloat16")
    # bfloat16 keeps 8 binary digits: against the sum in float32 each weight is off by up to 2^-9 of itself.
    moved = abs(np.log(probs(merged, "float32")) - np.log(probs(judge))).max()
    plain = CoTRAILJudge(TransformersBackend(str(tmp_path / "base")))
    alone = plain.score_rationales(["is this polite? ->", "a b"], ["so so", "no"])
    # A merge that forgot the adapter would be off by all of what it adds.
    assert moved < 0.2 * abs(np.log(alone) - np.log(probs(judge))).max()


def test_the_weights_are_of_16_bits_and_bear_no_mark_of_an_adapter_or_a_quantiser(tmp_path):
    merged = merge_judge(str(adapter(tmp_path)), tmp_path / "merged")
    config = json.loads((merged / "config.json").read_text())
    assert {weight.dtype for weight in weights(merged).values()} == {torch.bfloat16}
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert not [name for name in weights(merged) if "lora" in name or "base_layer" in name]
    assert not (merged / "adapter_config.json").exists()


def test_tied_embeddings_of_which_one_was_trained_are_two_weights_and_say_so(tmp_path):
    merged = merge_judge(str(adapter(tmp_path, "qwen2", modules_to_save=["lm_head"])), tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    saved = weights(merged)
    assert not torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


def test_tied_embeddings_that_were_not_trained_stay_one(tmp_path):
    merged = merge_judge(str(adapter(tmp_path, "qwen2", target_modules=["q_proj"])), tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in weights(merged)


def test_generation_settings_are_the_base_s_even_where_they_contradict_each_other(tmp_path):
    judge = adapter(tmp_path)
    settings = {"eos_token_id": [0, 2], "pad_token_id": 3, "temperature": 0.6, "do_sample": False}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    merged = merge_judge(str(judge), tmp_path / "merged")
    saved = json.loads((merged / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 2]
    AutoModelForCausalLM.from_pretrained(merged)


def test_what_the_judge_knows_and_what_converters_read_goes_along(tmp_path):
    judge = adapter(tmp_path)
    (judge / "tract_prompt.json").write_text('{"columns": {}, "rubric": null}')
    (judge / "LICENSE").write_text("yours")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"pieces")
    merged = merge_judge(str(judge), tmp_path / "merged")
    assert JudgeConfig.load(merged) == JudgeConfig.load(judge)
    names = {path.name for path in merged.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tract_prompt.json", "LICENSE"} <= names


def test_the_base_s_own_16_bits_are_kept(tmp_path):
    merged = merge_judge(str(adapter(tmp_path, dtype=torch.float16)), tmp_path / "merged")
    assert {weight.dtype for weight in weights(merged).values()} == {torch.float16}


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    judge = adapter(tmp_path, strength=1e3)
    with pytest.raises(ValueError, match="float16"):
        merge_judge(str(judge), tmp_path / "merged", "float16")
    assert not (tmp_path / "merged").exists()


def test_a_quantised_base_is_refused(tmp_path):
    judge = adapter(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised"):
        merge_judge(str(judge), tmp_path / "merged")


def test_a_whole_model_and_a_directory_in_use_are_refused(tmp_path):
    judge = adapter(tmp_path)
    JudgeConfig(SCALES).save(tmp_path / "base")
    with pytest.raises(ValueError, match="full model"):
        merge_judge(str(tmp_path / "base"), tmp_path / "merged")
    with pytest.raises(FileExistsError, match="not empty"):
        merge_judge(str(judge), tmp_path / "base")


def test_the_command_says_how_far_the_scores_moved(tmp_path, capsys):
    judge = adapter(tmp_path)
    base = json.loads((tmp_path / "base" / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (tmp_path / "base" / "config.json").write_text(json.dumps(base))
    assert main(["merge", "--model", str(judge), "--output_dir", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    mean, most = map(float, re.search(r"by ([\d.]+) on average and ([\d.]+) at most", said).groups())
    assert 0 < mean <= most < 0.2
