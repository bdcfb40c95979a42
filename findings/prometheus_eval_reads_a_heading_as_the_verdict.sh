#!/usr/bin/env bash
# prometheus-eval: where a feedback has "[Response A]" as a heading, A wins, whatever stands behind "[RESULT]".
#
# Guess beforehand: the prompt asks for "(write a feedback for criteria) [RESULT] (A or B)", so `single_relative_grade` returns
#   the letter behind [RESULT], at the end of the text, whatever the feedback is like.
# What happens: it returns the letter of the first line that ends in "[Response A]" or "[Response B]". A judge that writes about A
#   and B in turn under such headings, as its prompt has them ("###Response A:"), prefers A for ever. One that chooses the same
#   response in both orders, as it should, looks as if it always chose the first. With the heading followed by a colon or
#   in the running text the verdict is read. There is no warning.
# Why: one pattern finds all spellings of a verdict, and the first match counts. It has to be followed by `\s*$`, "the end of
#   string", but with re.MULTILINE `$` is the end of every line.
# Instead: take the text of the feedback, which is returned with the verdict, and read the letter behind its last [RESULT].
#
# Versions: Python 3.11, prometheus-eval 0.1.20, litellm 1.110.2. CPU, a second once installed; the judge's text is given.
# Seen (the judge chooses the response with a source; it is B, or A where the two are swapped):
#   headings:      wrote B, read A; wrote A, read A
#   with a colon:  wrote B, read B; wrote A, read A
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet prometheus-eval==0.1.20 litellm==1.110.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2> progress.txt <<'PYTHON' || { status=$?; tail -n 5 progress.txt; exit $status; }
import contextlib
import io
import sys

from prometheus_eval import PrometheusEval
from prometheus_eval.mock import MockLLM

ANSWERS = {"without": "It is seven.", "with": "It is seven, says the manual on page 3."}
NOTES = {"without": "It is right, but names no source.", "with": "It is right and names its source."}


class Judge(MockLLM):
    """Writes the text that it is given, as a judge that chooses the answer with a source might write it."""

    text = ""

    def completions(self, prompts, **options):
        return [self.text] * len(prompts)


def verdict(layout, first, second):
    """What is read, and what the judge wrote behind [RESULT]."""
    chosen = "A" if first == "with" else "B"
    notes = [layout.format(letter=letter, note=NOTES[kind]) for letter, kind in (("A", first), ("B", second))]
    with contextlib.redirect_stdout(io.StringIO()):
        judge = Judge("relative")
        judge.text = "\n".join(notes) + f"\n[RESULT] {chosen}"
        pair = dict(response_A=ANSWERS[first], response_B=ANSWERS[second])
        evaluation = PrometheusEval(model=judge)
        feedback, read = evaluation.single_relative_grade(instruction="How many?", rubric="Is it right?", **pair)
    assert feedback == judge.text
    return read, chosen


holds = True
for name, layout in (("headings", "[Response {letter}]\n{note}"), ("with a colon", "[Response {letter}]: {note}")):
    results = [verdict(layout, *order) for order in (("without", "with"), ("with", "without"))]
    print(f"{name + ':':14} " + "; ".join(f"wrote {chosen}, read {read}" for read, chosen in results))
    holds &= [chosen for _, chosen in results] == ["B", "A"]
    holds &= [read for read, _ in results] == (["A", "A"] if name == "headings" else ["B", "A"])
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
