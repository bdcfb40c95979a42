"""What goes wrong early in training and would otherwise be seen at its end: each said once, with its likely cause.

Looks at logged means alone; knows nothing of models or the trainer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trl_tract.training.config import TRACTConfig

PAPER_LEARNING_RATE = 1e-5
# 1 to 5, on which raft_weight=1 was chosen; the paper's own ablation gets worse from a weight of 5.
PAPER_RANGE, MOST_WEIGHT = 4.0, 25.0
# From here on the means are of a model that has moved: the first steps of any run look bad.
FIRST_STEPS = 20
LEAST_GRID_MASS = 0.01
# Parts of the score range. Three log entries in a row, so that one of a few like scores does not count.
LEAST_SPREAD, GOLD_SPREAD, STILL_FOR = 0.01, 0.1, 3


@dataclass
class _Watched:
    """One scale of the completions."""

    about: str  # put before messages
    suffix: str  # behind the names of its means
    low: float
    high: float
    raft_weight: float
    still: int = 0  # log entries in a row without a spread


class EarlyWarnings:
    """Says what looks wrong, each thing once.

    Example:
        >>> (message,) = EarlyWarnings(TRACTConfig("out", learning_rate=1e-2)).at_start()
        >>> message.split(" that ")[0]
        'learning_rate=0.01 is 1000 times the 1e-05'
    """

    def __init__(self, args: TRACTConfig) -> None:
        self.args = args
        self._said: set[str] = set()
        self._watched = [
            _Watched(
                scale.about,
                f"/{scale.name}" if scale.name else "",
                scale.grid.values[0],
                scale.grid.values[-1],
                weight,
            )
            for scale, weight in zip(args.scales, args.raft_weights, strict=True)
        ]

    def at_start(self) -> list[str]:
        """What is wrong before the first step."""
        said = []
        times = self.args.learning_rate / PAPER_LEARNING_RATE
        if times > 100:
            said += self._once(
                "learning rate",
                f"learning_rate={self.args.learning_rate:g} is {times:.0f} times the {PAPER_LEARNING_RATE:g} that "
                "TRACT's authors used for LoRA on 7B models. Small models can take more. If loss/score stops falling "
                "or all scores are the same, lower the learning rate first",
            )
        for watched in self._watched:
            span = watched.high - watched.low
            heavier = (span / PAPER_RANGE) ** 2
            if watched.raft_weight * heavier > MOST_WEIGHT:
                said += self._once(
                    f"range{watched.suffix}",
                    f"{watched.about}score_values span {span:g} rubric units, so at "
                    f"raft_weight={watched.raft_weight:g} the squared error weighs {watched.raft_weight * heavier:.0f} "
                    f"times as much as on a scale of 1 to 5, relative to the rationale. raft_weight={1 / heavier:.2g} "
                    "gives it the same weight",
                )
        return said

    def after_log(self, means: Mapping[str, float], step: int) -> list[str]:
        """What the means of one log entry show."""
        said: list[str] = []
        for watched in self._watched:
            mass, expected, spread, gold_spread = (
                means.get(f"{name}{watched.suffix}")
                for name in ("score/grid_mass", "score/expected", "spread/expected", "spread/gold")
            )
            if step < FIRST_STEPS or mass is None or expected is None or spread is None or gold_spread is None:
                continue
            if mass < LEAST_GRID_MASS:
                said += self._once(
                    f"grid mass{watched.suffix}",
                    f"{watched.about}after {step} steps only {mass:.1e} of the probability at the score position is on "
                    f"the grid, so expected scores are near 0. {self._mass_cause()}",
                )
            width = watched.high - watched.low
            still = spread < LEAST_SPREAD * width and gold_spread > GOLD_SPREAD * width
            watched.still = watched.still + 1 if still else 0
            if watched.still >= STILL_FOR:
                said += self._once(
                    f"still{watched.suffix}",
                    f"{watched.about}after {step} steps the expected score is {expected:.2f} for every row, although "
                    f"gold scores differ. {self._still_cause()}",
                )
        return said

    def _mass_cause(self) -> str:
        if self.args.normalize_grid and not self.args.score_in_ce:
            return (
                "normalize_grid=True does not train the mass on the grid. Set score_in_ce=True, or normalize_grid=False"
            )
        if self.args.raft_weight == 0 and not self.args.score_in_ce:
            return "With raft_weight=0 and score_in_ce=False nothing trains the score: set one of them"
        return "Probably the learning rate is too low, or the model was trained with another chat template or tokenizer"

    def _still_cause(self) -> str:
        if self.args.raft_weight == 0 and not self.args.score_in_ce:
            return "With raft_weight=0 and score_in_ce=False nothing trains the score: set one of them"
        return (
            "Probably all probability is on one score, where the squared error has no gradient. Start again with a "
            "lower learning_rate, or with score_in_ce=True. If it never moved at all, check which parameters are "
            "trainable"
        )

    def _once(self, what: str, message: str) -> list[str]:
        if what in self._said:
            return []
        self._said.add(what)
        return [message]


# A rationale of fewer tokens than this says nothing; below this share of its length at the start it shrinks.
LEAST_TOKENS, LEAST_SHARE = 3.0, 0.25
MOST_WITHOUT_SCORE = 0.5
# Nats per token: rationales that are drawn from less are all alike.
LEAST_ENTROPY = 0.02


class RolloutWarnings:
    """Says what looks wrong with the rationales of a reinforcement stage, each thing once.

    Args:
        values: Of the grid, rubric units.
        penalty: Of a rationale without a score, squared rubric units.

    Example:
        >>> warnings = RolloutWarnings([1.0, 5.0], 16.0)
        >>> warnings.after_log({"rationale/length": 40.0}, 1.0, 1)
        []
        >>> len(warnings.after_log({"rationale/length": 2.0}, 1.0, 30))
        1
    """

    def __init__(self, values: Sequence[float], penalty: float) -> None:
        self.width, self.penalty = values[-1] - values[0], penalty
        self.first_length: float | None = None
        self._said: set[str] = set()

    def after_log(self, means: Mapping[str, float], entropy: float, step: int) -> list[str]:
        """What the means of one log entry show.

        Args:
            entropy: Of the rationale's tokens, nats per token.
        """
        length = means.get("rationale/length")
        if length is None:
            return []
        self.first_length = length if self.first_length is None else self.first_length
        mass, spread = means.get("score/grid_mass"), means.get("score/spread")
        without = means.get("rationale/no_score", 0.0)
        said = []
        if without > MOST_WITHOUT_SCORE:
            said += self._once(
                "no score",
                f"{without:.0%} of the rationales at step {step} have no score, because they never reach the marker. "
                f"Their reward is {-self.penalty:g}, and they do not train the scores. Raise max_completion_length, or "
                "train with TRACT first, which teaches the marker",
            )
        if mass is not None and mass < 0.5:
            said += self._once(
                "grid mass",
                f"at step {step} only {mass:.0%} of the probability at the score position is on the grid, which pulls "
                "expected scores towards 0. Train with TRACT first, set gold_weight above 0, or lower the learning "
                "rate",
            )
        if length < min(self.first_length, max(LEAST_TOKENS, LEAST_SHARE * self.first_length)):
            said += self._once(
                "length",
                f"rationales are getting shorter: {self.first_length:.1f} tokens at the start, {length:.1f} at step "
                f"{step}. The model can score without them. If you want rationales, lower the learning rate or set "
                "beta above 0",
            )
        if entropy < LEAST_ENTROPY and (spread is None or spread < LEAST_SPREAD * self.width):
            said += self._once(
                "alike",
                f"at step {step} all rationales of a prompt are nearly identical (entropy {entropy:.3f} nats per "
                "token). Their advantages are 0, so the rationale is no longer trained. Lower the learning rate, or "
                "set entropy_coef or beta above 0",
            )
        return said

    def _once(self, what: str, message: str) -> list[str]:
        if what in self._said:
            return []
        self._said.add(what)
        return [message]
