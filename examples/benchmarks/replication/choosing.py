"""Which settings each row of the table has: chosen on training items, written down before a test is opened.

    choice:
      items: 300                       # training items that settings are judged by; the others are trained on
      rows: 600                        # of these so many; by default all
      by: item                         # they are taken out by item, or by question where the tests have other ones
      training: [{learning_rate: 1.0e-3}, {learning_rate: 2.0e-3}]       # what every trained model is tried with
      reinforcement: [{learning_rate: 1.0e-5}, {learning_rate: 1.0e-4}]  # and what REAL is
      alphas: [1, 10, 100, 1000]       # and what ridge regression is

A model gets the settings with the smallest root mean squared error of its expected score; models that learn from
another one learn from it as it was chosen. Everything is written into `choice.json`, what was not chosen included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from config import Replication

from trl_tract.files.journal import digest, read_json, write_json

FILE = "choice.json"


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the log of how.

    Attributes:
        chosen: Model -> its fields of TRACTConfig, of REALConfig, or `alpha`.
        log: A line for each setting that was tried: `model`, `settings`, `seed`, `rows`, `items`, `rmse` (rubric
            units), `pearson`, `grid_mass`, `failed`, `seconds` of its training.
        of: Digest of the configuration that it is of.
    """

    chosen: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    log: Sequence[dict[str, Any]] = ()
    of: str = ""

    @classmethod
    def read(cls, directory: Path) -> "Choice":
        """What `write` wrote.

        Raises:
            FileNotFoundError: Nothing has been chosen yet.
        """
        if not (directory / FILE).is_file():
            raise FileNotFoundError(f"{directory / FILE} is not there: the tests are opened once settings are chosen")
        return cls(**read_json(directory / FILE))

    def write(self, directory: Path) -> None:
        """Write it down, once."""
        write_json(directory / FILE, asdict(self), checked=True)

    def check(self, config: Replication) -> None:
        """Refuse a configuration whose settings were not chosen here.

        Raises:
            ValueError: Something was changed since that the choice depends on.
        """
        if self.of != chosen_for(config):
            raise ValueError("the settings were chosen for another configuration. Take another output directory")

    def settings(self, model: str) -> dict[str, Any]:
        """The chosen settings of a model; empty where there was nothing to choose."""
        return dict(self.chosen.get(model, {}))


def chosen_for(config: Replication) -> str:
    """The digest of all that a choice depends on."""
    aside = ("seeds", "tests", "test_items", "rows", "curve", "curve_rows", "several", "isolate")
    settings = {name: value for name, value in asdict(config).items() if name not in aside}
    return digest([settings])


def candidates(config: Replication, *, reinforced: bool) -> list[dict[str, Any]]:
    """The settings that a model is tried with."""
    given = config.choice.get("reinforcement" if reinforced else "training") or [{}]
    return [dict(each) for each in given]


def best(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one model's lines of the log the one with the smallest error; the first of equals."""
    return min(tried, key=lambda line: line["rmse"])
