#!/usr/bin/env bash
# datasets: in a column of mixed types, text does not stay text: "007" comes back as 7, and "-" as 0.
#
# Guess beforehand: since 4.8 a function given to `Dataset.map` may return text in one row and a number in another; the
#   column becomes `Json()`, and each row gets back what was returned for it. A column type for "arbitrary JSON" has to
#   know the text "7" from the number 7, as JSON does.
# What happens: text that can be read as JSON is read as JSON. "12" comes back as the number 12, "true" as True, "null" as
#   None, "[4, 3]" as a list. So does text that is no JSON at all, because the reader is lenient: "007" is 7, "NaN" None,
#   and a lone "-", which tables use for "no value", is 0. Any other text ("n/a") stays text. There is no warning.
# Why: `Json.encode_example` keeps text that pandas' `ujson_loads` can read as it stands, without quotes around it, and
#   decoding then reads it. `load_dataset("json")`, `from_list` and `from_dict` (`on_mixed_types="use_json"`) do the same.
# Instead: `json.dumps` each cell oneself, which is left as it is and decodes to what it was; or one type a column.
#
# Versions: Python 3.11, datasets 5.2.0, pandas 3.1.1, pyarrow 26.0.1. CPU, a second once installed.
# Seen:
#   returned:             [7, 'n/a', '12', '007', '-', 'null', 'NaN', '[4, 3]']
#   map:                  [7, 'n/a', 12, 7, 0, None, None, [4, 3]]  Json(decode=True)
#   load_dataset:         [7, 'n/a', 12, 7, 0, None, None, [4, 3]]  Json(decode=True)
#   map with json.dumps:  [7, 'n/a', '12', '007', '-', 'null', 'NaN', '[4, 3]']  Json(decode=True)
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

from datasets import Dataset, Features, Json, Value, load_dataset

CELLS = [7, "n/a", "12", "007", "-", "null", "NaN", "[4, 3]"]
READ = [7, "n/a", 12, 7, 0, None, None, [4, 3]]


def seen(name, dataset):
    print(f"{name + ':':21} {dataset['cell'][:]}  {dataset.features['cell']}")
    return dataset["cell"][:]


print(f"{'returned:':21} {CELLS}")
rows = Dataset.from_dict({"row": list(range(len(CELLS)))})
mapped = seen("map", rows.map(lambda row: {"cell": CELLS[row["row"]]}))
with open("cells.jsonl", "w", encoding="utf-8") as lines:
    lines.writelines(json.dumps({"cell": cell}) + "\n" for cell in CELLS)
loaded = seen("load_dataset", load_dataset("json", data_files="cells.jsonl", split="train"))
features = Features({"row": Value("int64"), "cell": Json()})
dumped = seen("map with json.dumps", rows.map(lambda row: {"cell": json.dumps(CELLS[row["row"]])}, features=features))
holds = mapped == loaded == READ and dumped == CELLS
print("as described" if holds else "CHANGED: not what is described at the top")
sys.exit(not holds)
PYTHON
