"""The reinforcement objective's numbers: rewards, advantages, and what ties its two terms together. Pure; no trainer.

Every rationale s is sampled, y_hat(s) is the expected score behind it, y the gold score. With the loss of a rationale

    l(s) = (y_hat(s) - y)^2 - gold_weight * log p(y | s)

the gradient of its expectation has two parts, since the score is the model's own:

    grad E[l] = E[ l(s) * grad log p(s) ]  +  E[ grad l(s) ]
                 the policy term               the direct term

Source: https://arxiv.org/abs/2603.17145
"""

import torch

EVEN_LENGTHS = ("dapo", "cispo", "vespo", "dr_grpo", "luspo")
"""Loss types of GRPOTrainer that divide every rationale of an update by the same number."""


def gold_log_likelihood(logprobs: torch.Tensor, gold: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of gold scores; one between two values of the grid counts for both, the nearer one more.

    Args:
        logprobs: Log-probabilities of the grid, nats, `(S, K)`.
        gold: Gold scores within the grid's range, rubric units, `(S,)`.
        values: Of the grid, increasing, rubric units, `(K,)`.

    Returns:
        `(S,)`, nats.

    Example:
        >>> gold_log_likelihood(torch.tensor([[-1.0, -2.0, -8.0]]), torch.tensor([1.5]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([-1.5000])
    """
    values, gold = values.to(logprobs), gold.to(logprobs)
    upper = torch.searchsorted(values, gold, right=True).clamp(1, len(values) - 1)  # (S,)
    part = (gold - values[upper - 1]) / (values[upper] - values[upper - 1])
    between = torch.stack([upper - 1, upper], dim=-1)  # (S, 2)
    return (logprobs.gather(-1, between) * torch.stack([1 - part, part], dim=-1)).sum(dim=-1)


def advantages_of(rewards: torch.Tensor, num_generations: int, *, normalised: bool) -> torch.Tensor:
    """How much better each rationale did than the others of its prompt.

    Unbiased: the reward minus the mean of the OTHER rewards of the group, so that the policy term is the true gradient.
    A mean that holds the reward itself would leave (G - 1) / G of it. Normalised: minus the mean of the group, divided
    by its standard deviation and kept in [-1, 1], as REAL does; that is another direction.

    Args:
        rewards: Groups one behind the other, `(N,)`.
        num_generations: Rationales of a group, G.
        normalised: Which of the two.

    Returns:
        `(N,)`, in the rewards' units, or without.

    Example:
        >>> advantages_of(torch.tensor([-1.0, -3.0]), 2, normalised=False)
        tensor([ 2., -2.])
    """
    groups = rewards.view(-1, num_generations)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if normalised:
        return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).clamp(-1, 1).flatten()
    return (centred * (num_generations / (num_generations - 1))).flatten()


def divisors(
    loss_type: str, mask: torch.Tensor, *, max_completion_length: int, mean_length: torch.Tensor
) -> torch.Tensor:
    """What GRPOTrainer's loss divides each rationale's sum over tokens by, beside the number of rationales.

    A term that is added to it has to be divided by the same.

    Args:
        loss_type: Of GRPOConfig.
        mask: Sampled tokens, `(B, T)`.
        max_completion_length: Of GRPOConfig.
        mean_length: Sampled tokens of a rationale, mean over what was generated together on all ranks.

    Returns:
        `(B,)`.
    """
    lengths = mask.sum(dim=1).clamp(min=1).to(mean_length)
    if loss_type in ("grpo", "sapo"):
        return lengths
    whole = {
        "luspo": torch.ones_like(mean_length),
        "dr_grpo": torch.full_like(mean_length, max_completion_length),
        "bnpo": mask.sum().clamp(min=1).to(mean_length) / len(mask),
    }
    return whole.get(loss_type, mean_length).expand_as(lengths)


def sequence_ratio(
    logps: torch.Tensor,
    old_logps: torch.Tensor | None,
    engine_ratio: torch.Tensor | None,
    mask: torch.Tensor,
    most: float | None,
) -> torch.Tensor:
    """Probability of each rationale now, over that under which it was sampled: the direct term's importance weight.

    Args:
        logps: Log-probabilities of the sampled tokens, nats, `(B, T)`.
        old_logps: The same when they were sampled; None where the model has not changed since.
        engine_ratio: What GRPOTrainer corrects a vLLM engine's own probabilities by: `(B, T)` for each token, or
            `(B, 1)` for the whole; None without an engine.
        mask: Sampled tokens, `(B, T)`.
        most: Larger ones are cut to it; None: none is.

    Returns:
        `(B,)`, without gradient.
    """
    ratio = torch.ones_like(logps[:, 0])
    if old_logps is not None:
        ratio = ((logps - old_logps) * mask).sum(dim=1).exp()
    if engine_ratio is not None:
        whole = engine_ratio.shape[1] == 1
        ratio = ratio * (engine_ratio[:, 0] if whole else engine_ratio.where(mask.bool(), 1.0).prod(dim=1))
    return ratio.detach().clamp(max=float("inf") if most is None else most)
