"""The page about serving does what it says: its requests are sent by curl and OpenAI's client to a server that runs."""

import contextlib
import io
import json
import subprocess

import pytest
from command_line import check, commands_of
from conftest import make_tokenizer
from pages import blocks_of, text_of
from serving import served

from trl_tract import CoTRAILJudge
from trl_tract.backends import ScriptedBackend
from trl_tract.sources.rubric import Rubric

PAGE = "docs/serving.md"
BLOCKS = {block.line: block for block in blocks_of(PAGE) if block.language in ("bash", "python")}
CURL = [line for line, block in BLOCKS.items() if "curl" in block.code]
PYTHON = [line for line, block in BLOCKS.items() if block.language == "python"]
NOT_RUN = [line for line, block in BLOCKS.items() if block.not_run]
URL = "http://127.0.0.1:8123"


@pytest.fixture(scope="module")
def server():
    text = " It says thanks. [RESULT] 1"
    backend = ScriptedBackend(lambda prompt, seed: text, make_tokenizer(), probs=[0.1, 0.0, 0.2, 0.6, 0.05])
    judge = CoTRAILJudge(backend)
    judge.chat = False
    judge.rubric = Rubric("Polite?", dict.fromkeys("12345", "so"))
    with served(judge) as started:
        yield started


@pytest.mark.parametrize("line", CURL)
def test_curl_is_answered(line, server):
    code = BLOCKS[line].code.replace(URL, server.url)
    done = subprocess.run(["/bin/bash", "-euc", code], capture_output=True, text=True, timeout=60, check=True)
    told = json.loads(done.stdout)
    for answer in told if isinstance(told, list) else [told]:
        assert answer["error"] is None
        assert answer["score"] == pytest.approx(3.35)


@pytest.mark.parametrize("line", PYTHON)
def test_the_python_of_the_page_prints_what_stands_below_it(line, server):
    pytest.importorskip("openai")
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(BLOCKS[line].code.replace(URL, server.url), PAGE, "exec"), names)
    names["client"].close()
    assert printed.getvalue() == BLOCKS[line].output


@pytest.mark.parametrize("line", NOT_RUN)
def test_the_commands_that_serve_are_taken_by_their_parser(line, tmp_path):
    for command in commands_of(BLOCKS[line].code, tmp_path):
        check(command)


def test_every_block_of_the_page_is_run_or_checked():
    assert sorted(CURL + PYTHON + NOT_RUN) == sorted(BLOCKS)
    assert len(CURL) == len(NOT_RUN) == 2


def test_the_page_lists_the_fields_of_an_answer(server):
    table = [line for line in text_of(PAGE).splitlines() if line.startswith("| `")]
    for name in server.ask({"prompt": "a"})[1]:
        assert f"`{name}`" in "".join(table)
