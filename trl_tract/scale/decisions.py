"""The expected score and the other decision rules. Pure functions; knows nothing of tokens or models."""

from typing import Literal, get_args

import torch

Decision = Literal["mean", "median", "mode", "sampled", "quantile"]


DECISIONS: tuple[Decision, ...] = get_args(Decision)


Pool = Literal["scores", "distributions"]


POOLS: tuple[Pool, ...] = get_args(Pool)


def expected_score(probs: torch.Tensor, values: torch.Tensor, *, normalize: bool = False) -> torch.Tensor:
    """Mean score under the model: the RAIL prediction, optimal for squared error.

    Probability off the grid counts as zero, so it pulls the mean towards 0; `normalize` divides by the mass on the
    grid.

    Args:
        probs: Grid-token probabilities under the softmax over the *whole* vocabulary, `(..., K)`.
        values: Scores in rubric units, `(K,)`, or as many as `probs`, where each has a grid of its own.
        normalize: Divide by `probs.sum(-1)`. The TRACT authors do not.

    Returns:
        float32 `(...)`, rubric units.

    Raises:
        ValueError: The last axis of `probs` is not as long as `values`.

    Example:
        >>> expected_score(torch.tensor([[0.25, 0.25]]), torch.tensor([2.0, 4.0]))
        tensor([1.5000])

    Source: Lukasik et al. 2024, https://aclanthology.org/2024.findings-emnlp.799
    """
    if probs.shape[-1] != values.shape[-1]:
        raise ValueError(
            f"probs has {probs.shape[-1]} entries in its last dimension, but the grid has {values.shape[-1]} values"
        )
    # float64 stays, so that an oracle can be compared with; half precision is lifted.
    probs = probs if probs.dtype == torch.float64 else probs.float()
    mean = (probs * values.to(probs)).sum(dim=-1)
    return mean / probs.sum(dim=-1) if normalize else mean


def temper(probs: torch.Tensor, score_temperature: float) -> torch.Tensor:
    """Sharpen (below 1) or flatten (above 1) score probabilities: `p^(1/T)`, rescaled to the mass they had.

    Args:
        probs: Grid-token probabilities, `(..., K)`.
        score_temperature: T, above 0; 1 changes nothing.

    Returns:
        `(..., K)`. The mass on the grid stays, so that T near 1 is near what 1 gives.

    Raises:
        ValueError: T is not above 0.

    Example:
        >>> temper(torch.tensor([0.2, 0.4]), 0.5)  # 0.04 to 0.16, scaled to 0.6
        tensor([0.1200, 0.4800])
    """
    if not score_temperature > 0:
        raise ValueError(
            f"score_temperature={score_temperature} must be above 0. For its limit at 0, use the rule 'mode'"
        )
    if score_temperature == 1:
        return probs
    return (probs.log() / score_temperature).softmax(dim=-1) * probs.sum(dim=-1, keepdim=True)


def check_quantile(quantile: float) -> None:
    """Refuse a quantile that no score can be."""
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile} must lie between 0 and 1: the median is 0.5")


def decide(
    probs: torch.Tensor,
    values: torch.Tensor,
    rule: Decision = "mean",
    *,
    normalize: bool = False,
    score_temperature: float = 1.0,
    quantile: float = 0.5,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Turn score probabilities into one score each.

    `mean` is optimal for squared error, `median` for absolute error, `mode` for 0-1 loss, and `quantile` for absolute
    error where scoring too low costs `quantile / (1 - quantile)` times as much as scoring too high; `sampled` draws
    from the distribution on the grid, which is what decoding the score token does. All but the mean depend on the
    distribution on the grid alone, so mass off the grid does not move them.

    Args:
        probs: Grid-token probabilities under the whole vocabulary, `(..., K)`.
        values: Scores in rubric units, increasing, `(K,)`.
        rule: One of `mean`, `median`, `mode`, `sampled`, `quantile`.
        normalize: For `mean` only: see `expected_score`.
        score_temperature: See `temper`; the mode does not depend on it.
        quantile: Of `quantile`: the lowest score at or below which at least this share of the distribution lies.
        generator: Source of randomness of `sampled`.

    Returns:
        `(...)`, rubric units.

    Raises:
        ValueError: `rule` is none of the five, the temperature is not above 0, or the quantile is not between 0 and 1.

    Example:
        >>> probs, values = torch.tensor([[0.5, 0.3, 0.1]]), torch.tensor([1.0, 2.0, 3.0])
        >>> decide(probs, values, "median"), decide(probs, values, "mode")
        (tensor([1.]), tensor([1.]))
        >>> decide(probs, values, "quantile", quantile=0.8)
        tensor([2.])

    Source: Koenker and Bassett 1978 for the loss that a quantile is optimal for, https://doi.org/10.2307/1913643
    """
    probs = temper(probs, score_temperature)
    if rule == "mean":
        return expected_score(probs, values, normalize=normalize)
    values = values.to(probs)
    if rule == "mode":
        return values[probs.argmax(dim=-1)]
    on_grid = probs / probs.sum(dim=-1, keepdim=True)
    if rule in ("median", "quantile"):
        check_quantile(quantile)
        # Half a float32 rounding step of slack: [0.5, 0.5] has its lower median at the first value.
        reached = on_grid.cumsum(dim=-1) >= (0.5 if rule == "median" else quantile) - 1e-6
        return values[reached.int().argmax(dim=-1)]
    if rule == "sampled":
        flat = on_grid.reshape(-1, on_grid.shape[-1])
        drawn = torch.multinomial(flat, 1, generator=generator).reshape(on_grid.shape[:-1])
        return values[drawn]
    raise ValueError(f"decision={rule!r} is unknown: choose one of {', '.join(DECISIONS)}")
