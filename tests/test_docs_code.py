"""Every python and bash block of the README, of docs/ and of the examples' pages is run, or checked with a reason.

The blocks of a page run in order, in one namespace and one directory, on tiny random models that lie where the page's
hub ids would be looked for. A block below `<!-- not run: REASON -->` is only checked: its names import, its calls fit
their signatures, its options are taken by the real parsers.
"""

import ast
import contextlib
import inspect
import io
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command_line import PYTHON, check, commands_of
from conftest import make_model, make_rows, make_tokenizer
from datasets import Dataset
from fake_server import FakeServer
from pages import PAGES, ROOT, Block, blocks_of, text_of
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_tract.cli import main
from trl_tract.files.journal import write_jsonl
from trl_tract.rows.tokens import resolve_scales
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import read_scales

# Pages whose blocks a test of their own runs, with the files that they need.
ELSEWHERE = {
    "docs/data.md": "tests/test_data_docs.py",
    "docs/score_scales.md": "tests/test_aspect_judge.py",
    "docs/serving.md": "tests/test_serving_docs.py",
}
BLOCKS = {
    page: [block for block in blocks_of(page) if block.language in ("python", "bash")]
    for page in PAGES
    if page not in ELSEWHERE
}
CHECKED = [block for blocks in BLOCKS.values() for block in blocks if block.not_run]
RUN: dict[str, list[Block]] = {
    page: [block for block in blocks if not block.not_run] for page, blocks in BLOCKS.items()
}

# How many blocks of a page are not run. A new one has to be wanted: it changes this.
NOT_RUN = {
    "README.md": 3,
    "docs/benchmarks.md": 1,
    "docs/bootstrap.md": 2,
    "docs/contributing.md": 2,
    "docs/defaults.md": 2,
    "docs/evaluation.md": 1,
    "docs/frameworks.md": 5,
    "docs/generation.md": 4,
    "docs/hub.md": 5,
    "docs/index.md": 2,
    "docs/large_runs.md": 1,
    "docs/many_machines.md": 3,
    "docs/multi_gpu.md": 1,
    "docs/real.md": 3,
    "docs/recipes.md": 2,
    "docs/replication.md": 6,
    "docs/training_options.md": 0,
    "examples/benchmarks/README.md": 5,
}
# Half a minute or more, most of it in the imports of TRL's trainers and in generation.
SLOW = {"README.md", "docs/index.md", "docs/recipes.md", "docs/rewards.md", "docs/training_options.md"}
FEW = "max_new_tokens=8, max_attempts=1"
# What is made smaller before a block runs, so that it takes seconds. Each text has to be there.
SMALLER = {
    "README.md": {
        'from_pretrained("stage1")': f'from_pretrained("stage1", {FEW})',
        'Judge.from_pretrained("judge")': f'Judge.from_pretrained("judge", {FEW})',
    },
    "docs/bootstrap.md": {"keep=1": "keep=1, max_new_tokens=8"},
    "docs/generation.md": {"http://localhost:8000/v1": "FAKE_SERVER"},
    "docs/rewards.md": {
        'from_pretrained("judge")': f'from_pretrained("judge", {FEW})',
        "max_steps=200": "max_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False",
        "max_completion_length=256": "max_completion_length=8",
    },
    "docs/index.md": {'from_pretrained("my-judge/tract")': f'from_pretrained("my-judge/tract", {FEW})'},
    "docs/recipes.md": {', device_map={"": 0}': "", '("stage1", backend)': f'("stage1", backend, {FEW})'},
}
# And what is added to commands.
SMALL_STEPS = ["--max_steps", "2", "--bf16", "false", "--save_strategy", "no", "--report_to", "none"]
SMALL_TEXTS = ["--max_new_tokens", "8", "--max_attempts", "1"]
ADDED = {
    "bootstrap": SMALL_TEXTS[:2],
    "run": [*SMALL_STEPS, *SMALL_TEXTS],
    "train": SMALL_STEPS,
    "distill": SMALL_TEXTS,
    "judge": SMALL_TEXTS,
}
# What a page takes for granted.
GIVEN: dict[str, dict[str, Any]] = {"docs/training_options.md": {"rows": Dataset.from_list(make_rows(8))}}


def named(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A seed model and a judge, tiny and random."""
    directory, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    scales = resolve_scales(tokenizer, {"prompt": "a", "completion": " b [RESULT] 3"}, read_scales({}))
    for name in ("seed", "judge"):
        # Wide enough for blocks of 64: bitsandbytes 0.50 repacks 4-bit weights by them on processors with AVX512-BF16.
        make_model(std=0.1, width=128).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    JudgeConfig(scales).save(directory / "judge")
    return directory


@pytest.fixture
def workplace(models, tmp_path, monkeypatch) -> Path:
    """A reader's directory: the repository's examples, rows, a judge, and a model under each hub id that pages name."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_jsonl(tmp_path / "rows.jsonl", make_rows(12))
    for name in ("judge", "stage1"):
        shutil.copytree(models / "judge", tmp_path / name)
    hub_ids = re.findall(r'["\s](\w[\w.-]*/[\w.-]*\d[Bb][\w.-]*)["\s]', "".join(map(text_of, PAGES)))
    for hub_id in sorted(set(hub_ids)):
        shutil.copytree(models / "seed", tmp_path / hub_id)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(block: Block, code: str, names: dict[str, Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n" * block.line + code, block.page, "exec"), names)
    return printed.getvalue()


def run_bash(code: str, workplace: Path) -> str:
    output = ""
    for program, *arguments in commands_of(code, workplace):
        if program == "trl-tract":
            said = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(said):
                code_of = main([*arguments, *ADDED.get(arguments[0], [])])
            assert code_of == 0, said.getvalue()
            output += printed.getvalue()
        elif program == "python":
            done = subprocess.run([PYTHON, *arguments], cwd=workplace, capture_output=True, text=True, check=True)
            output += done.stdout
        else:
            pytest.fail(f"{program} is not run in a test: say why above the block, <!-- not run: REASON -->")
    return output


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in RUN if RUN[page]]
)
def test_the_blocks_of_a_page_run_and_print_what_stands_below_them(page, workplace):
    names: dict[str, Any] = {"__name__": "page", **GIVEN.get(page, {})}
    server = FakeServer(make_tokenizer()) if "FAKE_SERVER" in SMALLER.get(page, {}).values() else None
    smaller = dict.fromkeys(SMALLER.get(page, {}), False)
    if page == "docs/report.md":
        run_bash("trl-tract judge --model judge --data rows.jsonl --output_dir my-judge/judged-tract", workplace)
    if page == "docs/recipes.md":
        base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B-Instruct")
        adapter = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(base, adapter).save_pretrained("stage1")
    for block in RUN[page]:
        code = block.code
        for text, other in SMALLER.get(page, {}).items():
            smaller[text] |= text in code
            code = code.replace(text, server.url if server and other == "FAKE_SERVER" else other)
        printed = run_python(block, code, names) if block.language == "python" else run_bash(code, workplace)
        if block.output is not None:
            shown = [line.rstrip() for line in block.output.splitlines()]
            assert [line.rstrip() for line in printed.splitlines()] == shown, named(block)
    assert all(smaller.values()), smaller
    if server:
        server.stop()


@pytest.mark.parametrize("block", [block for block in CHECKED if block.language == "bash"], ids=named)
def test_the_options_of_a_command_that_is_not_run_are_taken_by_its_parser(block, workplace):
    commands = commands_of(block.code, workplace)
    assert commands
    for command in commands:
        check(command)


@pytest.mark.parametrize("block", [block for block in CHECKED if block.language == "python"], ids=named)
def test_the_names_of_code_that_is_not_run_import_and_its_calls_fit(block):
    tree = ast.parse(block.code)
    names: dict[str, Any] = {}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for module in {"inspect_ai", "mlflow"} & set(re.findall(r"\b\w+\b", block.code)):
        pytest.importorskip(module)
    exec(compile(ast.Module(imports, []), block.page, "exec"), names)
    fitted = 0
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        root = call.func
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root.id in names:
            called = eval(compile(ast.Expression(call.func), block.page, "eval"), names)
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            inspect.signature(called).bind(*[None] * len(call.args), **keywords)
            fitted += 1
    assert fitted


def test_no_block_is_left_out_without_a_reason():
    # Counted apart from the parser of pages.py.
    fences = sum(len(re.findall(r"^```+(?:python|bash)$", text_of(page), re.MULTILINE)) for page in BLOCKS)
    assert fences == len(CHECKED) + sum(map(len, RUN.values()))
    reasons = sum(text_of(page).count("<!-- not run: ") for page in BLOCKS)
    assert reasons == len(CHECKED)


def test_the_blocks_that_are_not_run_are_those_that_were_wanted():
    assert Counter(block.page for block in CHECKED) == Counter(NOT_RUN)


def test_code_stands_in_blocks_that_name_their_language():
    # Anything else would be neither run nor checked. Indented code is found by its commands.
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in ("python", "bash", "text", "yaml", "json", "diff", "csv"), named(block)
        indented = re.findall(r"^ {4,}(?:trl-tract|python3?|pip|accelerate|torchrun) .*$", text_of(page), re.MULTILINE)
        inside = "".join(block.code for block in blocks_of(page))
        assert not [line for line in indented if line not in inside], page


@pytest.mark.parametrize("page", sorted(set(ELSEWHERE) & set(PAGES)))
def test_a_page_that_is_left_to_another_test_is_read_by_it(page):
    assert Path(page).name in (ROOT / ELSEWHERE[page]).read_text(encoding="utf-8")
