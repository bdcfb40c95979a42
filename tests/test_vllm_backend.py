"""What VLLMBackend refuses before it starts an engine; `test_vllm_real.py` has the engine."""

import json
import sys
from dataclasses import asdict, make_dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BartConfig

import trl_tract.backends.vllm as vllm_backend
from trl_tract import VLLMBackend
from trl_tract.backends.loading import adapter_config
from trl_tract.backends.vllm_versions import require_vllm


@pytest.fixture
def model():
    return make_model()


def test_without_vllm_the_error_is_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "trl-tract\[vllm\]"'):
        VLLMBackend("judge")


@pytest.mark.parametrize(("version", "refused"), [("0.21.0", True), ("0.22.0+cpu", False), ("0.33.0", False)])
def test_a_vllm_whose_chosen_log_probabilities_are_not_exact_is_refused(monkeypatch, version, refused):
    vllm = ModuleType("vllm")
    vllm.__spec__, vllm.__version__ = ModuleSpec("vllm", None), version
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    if not refused:
        return require_vllm()
    with pytest.raises(ImportError, match=version):
        require_vllm()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"max_modle_len": 512}, r"no argument 'max_modle_len': did you mean max_model_len\?"),
        (
            {"logprobs_mode": "processed_logprobs"},
            "logprobs_mode='processed_logprobs' would not report log-probabilities",
        ),
        ({"speculative_config": {"model": "draft"}}, "gives no log-probabilities of chosen tokens"),
        ({"trust_remote_code": True}, "would run code from the checkpoint"),
        ({"quantization": "bitsandbytes"}, r"no longer reads bitsandbytes weights \(since 0.28\)"),
    ],
)
def test_an_engine_argument_that_cannot_work_is_refused(argument, message):
    known = ["speculative_config", "max_model_len", "logprobs_mode", "trust_remote_code", "quantization", "dtype"]
    with pytest.raises(ValueError, match=message):
        vllm_backend._check_arguments(argument, known)


def test_engine_arguments_that_vllm_has_pass():
    vllm_backend._check_arguments({"dtype": "float32", "logprobs_mode": "raw_logprobs"}, ["dtype", "logprobs_mode"])


def test_an_encoder_decoder_is_refused(tmp_path):
    BartConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        vllm_backend._check_checkpoint(str(tmp_path))


@pytest.mark.parametrize("quantised", [True, False])
def test_bitsandbytes_weights_are_refused_and_others_are_not(model, tmp_path, quantised):
    model.config.save_pretrained(tmp_path)
    if not quantised:
        vllm_backend._check_checkpoint(str(tmp_path))
        return
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="16-bit"):
        vllm_backend._check_checkpoint(str(tmp_path))


# As EVA writes them: the factor of every module stays what it is.
ADJUSTED = {"rank_pattern": {"q_proj": 20}, "alpha_pattern": {"q_proj": 40}}


@pytest.mark.parametrize(
    ("settings", "room"), [({"r": 8}, 8), ({"r": 12}, 16), ({"r": 4, "lora_alpha": 8} | ADJUSTED, 32)]
)
def test_room_is_made_for_the_largest_rank_of_an_adapter(settings, room):
    arguments = vllm_backend._lora_arguments("a", LoraConfig(**settings))
    assert arguments == {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoraConfig(use_dora=True), "DoRA"),
        (LoraConfig(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(init_lora_weights="olora"), "init_lora_weights='olora'"),
        (LoraConfig(lora_bias=True), "lora_bias=True"),
        (LoraConfig(bias="all"), "bias='all'"),
        (LoraConfig(trainable_token_indices=[5]), r"trainable_token_indices=\[5\]"),
        (LoraConfig(target_parameters=["experts.down_proj"]), "target_parameters="),
        (LoraConfig(layer_replication=[(0, 2)]), "layer_replication="),
        (LoraConfig(rank_pattern={"q_proj": 4}), "rank_pattern or alpha_pattern"),
        (LoraConfig(alpha_pattern={"q_proj": 3}), "rank_pattern or alpha_pattern"),
        (LoraConfig(r=1000), "rank 1000, but vLLM serves ranks up to 512"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "serves only LoRA. Use TransformersBackend"),
    ],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused(adapter, message):
    with pytest.raises(ValueError, match=message):
        vllm_backend._lora_arguments("somewhere", adapter)


@pytest.mark.parametrize(
    "settings",
    [{"use_rslora": True, "lora_dropout": 0.1}, {"init_lora_weights": "orthogonal"}],
)
def test_an_adapter_that_vllm_serves_is_not_refused(settings):
    assert vllm_backend._lora_arguments("a", LoraConfig(r=8, target_modules=["q_proj"], **settings))


def test_an_adapter_that_holds_an_embedding_is_refused(model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"it holds .*weight in full"):
        vllm_backend._lora_arguments(str(tmp_path), LoraConfig(r=2))


def test_an_adapter_without_a_base_is_refused(model, tmp_path):
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        adapter_config(str(tmp_path))


@pytest.fixture
def engines(monkeypatch) -> list[dict[str, Any]]:
    """The arguments of the engines that were started, of a vLLM whose engine never comes up."""
    started = []

    class Engine:
        @staticmethod
        def from_engine_args(arguments):
            started.append(asdict(arguments))
            raise RuntimeError("no GPU")

    names = ("model", "tokenizer", "enable_prefix_caching", "disable_log_stats", "enable_lora", "max_loras")
    arguments = make_dataclass(
        "Arguments", [(name, Any, None) for name in (*names, "max_lora_rank", "speculative_config")]
    )
    for name, parts in {
        "vllm": {"__spec__": ModuleSpec("vllm", None), "__version__": "0.22.0"},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": arguments},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": object},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": Engine},
    }.items():
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    return started


@pytest.mark.parametrize(
    ("settings", "argument", "message"),
    [
        ({}, {"speculative_config": {"model": "draft"}}, "gives no log-probabilities of chosen tokens"),
        *[
            (settings, {}, "vLLM cannot serve .* unmerged")
            for settings in (
                *({"init_lora_weights": start} for start in ("pissa", "olora")),
                *({"lora_bias": True}, {"trainable_token_indices": [5]}),
            )
        ],
        ({}, {}, "engine does not start"),
    ],
)
def test_what_cannot_work_is_refused_before_the_engine_starts(model, tmp_path, engines, settings, argument, message):
    model.config.save_pretrained(tmp_path / "seed")
    lora = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(tmp_path / "seed"), **settings)
    lora.save_pretrained(str(tmp_path / "judge"))
    with pytest.raises((ValueError, RuntimeError), match=message):
        VLLMBackend(tmp_path / "judge", make_tokenizer(), **argument)
    assert [started["enable_lora"] for started in engines] == ([True] if "start" in message else [])
