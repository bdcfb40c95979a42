"""Where a stop text counts, the same in every engine: text goes on past a mention, special tokens are seen."""

import pytest
import torch
from conftest import make_model, make_tokenizer
from fake_server import FakeServer
from transformers import LlamaForCausalLM

from trl_tract import ServerBackend
from trl_tract.backends import Generation, ScriptedBackend, Stop, TransformersBackend
from trl_tract.rows.tokens import resolve_scales
from trl_tract.scale.scale import read_scales

SCORES = ["1", "2", "3", "4", "5"]


class Writer(LlamaForCausalLM):
    """Writes `script` behind a prompt of one token; of each token of `expected` it says that it is e^-2 as probable."""

    script: list[int]
    expected: tuple[int, ...] = ()

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        kept = position_ids[:, -output.logits.shape[1] :]
        following = torch.tensor(self.script)[kept.clamp(max=len(self.script) - 1)]
        logits = torch.full_like(output.logits, -1e4)
        logits[..., list(self.expected)] = -2.0
        output.logits = logits.scatter(-1, following[..., None], 0.0)
        return output


@pytest.fixture(params=["transformers", "server", "scripted"])
def write(request):
    """What an engine writes behind one prompt, when its model wants to write `text`."""
    closing = []

    def write(text: str, stop: str, tokenizer=None, **settings) -> Generation:
        tokenizer = tokenizer or make_tokenizer()
        if request.param == "transformers":
            model = Writer(make_model(vocab=len(tokenizer)).config).eval()
            model.script = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            backend = TransformersBackend(model, tokenizer)
        elif request.param == "server":
            server = FakeServer(tokenizer, max_model_len=256)
            closing.append(server.stop)
            server.texts[5] = text
            backend = ServerBackend(server.url, "judge", tokenizer=tokenizer)
            closing.append(backend.close)
        else:
            backend = ScriptedBackend([text], tokenizer)
        ((generation,),) = backend.generate([[5]], stop=stop, temperature=0, **settings)
        assert (
            list(generation.token_ids)
            == tokenizer(text, add_special_tokens=False)["input_ids"][: len(generation.token_ids)]
            or generation.token_ids[-1] == tokenizer.eos_token_id
        )
        return generation

    yield write
    for close in reversed(closing):
        close()


STOP = Stop("[RESULT]", SCORES)
LETTERS = Stop("[RESULT]", ["A", "B"])


@pytest.mark.parametrize(
    ("text", "stop", "rationale", "reason"),
    [
        ("it is short [RESULT] 4 and", STOP, "it is short ", "stop"),
        ("i end with [RESULT] and 4. it is short [RESULT] 4", STOP, "i end with [RESULT] and 4. it is short ", "stop"),
        ("[RESULT] is [RESULT] or [RESULT]\n5", STOP, "[RESULT] is [RESULT] or ", "stop"),
        ("i end with [RESULT] and no score", STOP, "i end with [RESULT] and no score", "eos"),
        ("it is short [RESULT]", STOP, "it is short ", "stop"),
        ("it is short [RESULT]\t \t4", STOP, "it is short ", "stop"),
        ("it is [RESULT] short", "[RESULT]", "it is ", "stop"),
        ("it is [RESULT] po, so [RESULT] poor", Stop("[RESULT]", ["poor", "fair"]), "it is [RESULT] po, so ", "stop"),
        ("see [RESULT] Above. it is [RESULT] A", LETTERS, "see [RESULT] Above. it is ", "stop"),
        ("it is [RESULT] A and so", LETTERS, "it is ", "stop"),
        ("<a> [RESULT] 2 </a> so [RESULT] 1", Stop("[RESULT]", SCORES, lambda text: "</a>" in text), None, "stop"),
        ("<a> [RESULT] 2", Stop("[RESULT]", SCORES, lambda text: "</a>" in text), "<a> [RESULT] 2", "eos"),
    ],
)
def test_a_stop_text_ends_a_text_where_it_counts(write, text, stop, rationale, reason):
    generation = write(text, stop)
    assert generation.text == ("<a> [RESULT] 2 </a> so " if rationale is None else rationale)
    assert generation.finish_reason == reason


def test_the_tokens_behind_the_score_are_not_written(write):
    tokenizer = make_tokenizer()
    generation = write("it [RESULT] is short [RESULT] 4 and long and wrong", STOP, tokenizer)
    assert tokenizer.decode(generation.token_ids).endswith("[RESULT] 4")
    assert generation.num_tokens == len(generation.token_ids)


@pytest.mark.parametrize("more", [0, 2])
def test_a_text_that_runs_out_of_tokens_behind_a_mention_says_so(write, more):
    tokenizer = make_tokenizer()
    used = len(tokenizer("it [RESULT] is")["input_ids"]) + more
    generation = write("it [RESULT] is short [RESULT] 4", STOP, tokenizer, max_new_tokens=used)
    assert (generation.finish_reason, generation.num_tokens) == ("length", used)


@pytest.fixture(scope="module")
def special():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|score|>", "<|header|>"], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("marker", ["<|score|>", "<|score|> so"])
def test_a_stop_text_of_special_tokens_is_seen(write, special, marker):
    generation = write(f"it is short {marker} 4", Stop(marker, SCORES), special)
    assert (generation.text, generation.finish_reason) == ("it is short ", "stop")


@pytest.mark.parametrize("write", ["transformers", "server"], indirect=True)
def test_other_special_tokens_are_left_out(write, special):
    assert write("<|header|>it is short <|score|> 4", Stop("<|score|>", SCORES), special).text == "it is short "


def test_who_knows_strings_alone_stops_at_the_first_occurrence():
    assert "a [RESULT] b".index(STOP) == 2
    assert (STOP, f"{STOP}") == ("[RESULT]", "[RESULT]")


def test_a_grid_of_many_scores_needs_few_strings():
    assert len(Stop("[RESULT]", [str(score) for score in range(101)]).strings) == 30


# What a model samples at a score's place

TOKENIZER, JOINING = make_tokenizer(), make_tokenizer(split_digits=False)
ROW = {"prompt": "a", "completion": " b [RESULT] 3"}


def scale_of(tokenizer):
    return resolve_scales(tokenizer, ROW, read_scales({}))[0]


def sampled(pieces: list[str], tokenizer=TOKENIZER, *, expects: bool = False) -> Generation:
    """What comes of a model that writes the pieces, each in tokens of its own, and then ends its turn."""
    ids = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    scale = scale_of(tokenizer)
    model = Writer(make_model(vocab=len(tokenizer)).config).eval()
    model.script = [*ids, tokenizer.eos_token_id]
    model.expected = scale.grid.token_ids if expects else ()
    backend = TransformersBackend(model, tokenizer)
    ((generation,),) = backend.generate([[5]], stop=Stop.at(scale), temperature=0)
    return generation


def test_a_word_where_the_tokens_of_a_score_begin_is_no_mention():
    # " a" is one token: a space by itself and then "a" is written by a model that is at a score's place alone.
    generation = sampled([" fine [RESULT]", " ", "and", " reply is long [RESULT] 4"])
    assert (generation.text, generation.finish_reason) == (" fine ", "stop")
    assert TOKENIZER.decode(generation.token_ids) == " fine [RESULT] a"


@pytest.mark.parametrize(("expects", "text"), [(True, " fine "), (False, " fine [RESULT] just so ")])
def test_where_a_text_leaves_it_open_the_probability_of_the_scores_decides(expects, text):
    # " j" is two tokens here in any text: this may be a score's place, or the word "just".
    generation = sampled([" fine [RESULT] just so [RESULT] 4"], expects=expects)
    assert (generation.text, generation.finish_reason) == (text, "stop")


@pytest.mark.parametrize(("expects", "text"), [(True, " fine "), (False, " fine [RESULT] so ")])
def test_where_scores_hold_the_space_before_them_their_probability_decides(expects, text):
    generation = sampled([" fine [RESULT] so [RESULT] 4"], JOINING, expects=expects)
    assert (generation.text, generation.finish_reason) == (text, "stop")


@pytest.mark.parametrize("write", ["server"], indirect=True)
def test_a_server_is_asked_for_the_probability_of_the_scores(write):
    # This one gives e^-1 to the first token that it is asked for, whichever that is.
    stop = Stop.at(scale_of(TOKENIZER))
    assert write(" fine [RESULT] just so [RESULT] 4", stop).text == " fine "
    assert write(" fine [RESULT] and so [RESULT] 4", stop).text == " fine [RESULT] and so "


def test_a_score_s_place_counts_where_nothing_better_comes():
    assert sampled([" fine [RESULT] just"]).text == " fine "
    assert sampled([" fine [RESULT] so"], JOINING).finish_reason == "eos"


def test_a_sequence_that_goes_on_past_a_mention_leaves_the_others_as_they_are():
    # Behind the long prompt any token is as likely as another, behind the short one a text is given.
    far = 50

    class Mixed(Writer):
        def forward(self, input_ids=None, position_ids=None, **kwargs):
            output = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
            output.logits[position_ids[:, -output.logits.shape[1] :] >= far - 1] = 0.0
            return output

    texts = []
    for text in (" fine [RESULT] just so [RESULT] 4", " fine [RESULT] 4"):
        model = Mixed(make_model(vocab=len(TOKENIZER)).config).eval()
        model.script = [*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
        backend = TransformersBackend(model, TOKENIZER)
        asked = {"stop": Stop.at(scale_of(TOKENIZER)), "seed": 3, "max_new_tokens": 40}
        first, second = backend.generate([[5], [6] * far], **asked)
        texts.append((first[0].text, second[0].text))
    (one, drawn), (other, again) = texts
    assert (one, other) == (" fine [RESULT] just so ", " fine ")
    assert drawn == again
