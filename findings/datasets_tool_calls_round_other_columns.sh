#!/usr/bin/env bash
# datasets: two tool calls with different arguments in a JSON Lines file round the numbers in all other columns.
#
# Guess beforehand: `load_dataset("json")` stores the tool calls' arguments as `Json()`, because their keys differ, and reads
#   the columns beside them, of plain numbers (`Value("float64")`), as it reads them without tool calls: exactly.
# What happens: every number of the file keeps 10 decimals. 1/3 becomes 0.3333333333, and a probability of 1e-11 becomes 0.0,
#   so its logarithm is -inf. It is not a matter of size: 1e-17, which is smaller, stays as it is. The features look the
#   same with and without tool calls, and there is no warning.
# Why: for `Json()` fields the reader decodes whole lines and encodes them again with pandas' `ujson_dumps`, whose
#   `double_precision` is 10; numbers below 1e-15 it writes with an exponent. That pandas' reader may lose the last bit ("0.7"
#   read as 0.7000000000000001) is known; this is another loss, and far larger.
# Instead: parse the lines with `json` and use `Dataset.from_list(rows, on_mixed_types="use_json")`; plain columns stay exact.
#
# Versions: Python 3.11, datasets 5.2.0, pandas 3.1.1, pyarrow 26.0.1. CPU, a second once installed.
# Seen:
#   written:                     [0.3333333333333333, 1e-11, 1e-17]
#   read, same keys:             [0.3333333333333333, 1e-11, 1e-17]  Value('float64')
#   read, different keys:        [0.3333333333, 0.0, 1e-17]  Value('float64')
#   from_list, different keys:   [0.3333333333333333, 1e-11, 1e-17]  Value('float64')
#
# Exits 0 if the libraries still behave so, 1 if they no longer do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pandas==3.1.1 pyarrow==26.0.1 numpy==2.3.5
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - <<'PYTHON'
import json
import sys

from datasets import Dataset, load_dataset

NUMBERS = [1 / 3, 1e-11, 1e-17]


def written(file, second_key):
    calls = [{"name": "light", "arguments": {"room": 1}}, {"name": "music", "arguments": {second_key: 2}}]
    rows = [{"calls": calls, "probability": number} for number in NUMBERS]
    with open(file, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def seen(name, dataset):
    print(f"{name + ':':28} {dataset['probability'][:]}  {dataset.features['probability']}")
    return dataset["probability"][:]


print(f"{'written:':28} {NUMBERS}")
written("same.jsonl", "room")
rows = written("different.jsonl", "volume")
same = seen("read, same keys", load_dataset("json", data_files="same.jsonl", split="train"))
different = seen("read, different keys", load_dataset("json", data_files="different.jsonl", split="train"))
listed = seen("from_list, different keys", Dataset.from_list(rows, on_mixed_types="use_json"))
holds = same == NUMBERS == listed and different == [0.3333333333, 0.0, 1e-17]
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
