"""Answers to a probe, as fingerprints hold them: text that begins with "~ " is log-probabilities, in nats.

Knows nothing of who answers, or of where fingerprints are kept.
"""

from typing import Any

_MOVES = 0.25  # nats by which batches, kernels and 16 bits may move the answers to a probe


def same_answers(one: Any, other: Any) -> bool:
    """Whether two values of a fingerprint agree: the numbers of a probe ("~ ...") up to what noise moves them.

    Example:
        >>> same_answers("~ -1.0 -2.0", "~ -1.1 -2.0"), same_answers("~ -1.0", "~ -1.5"), same_answers("a", "a")
        (True, False, True)
    """
    if not all(isinstance(text, str) and text.startswith("~ ") for text in (one, other)):
        return bool(one == other)
    ours, theirs = ([float(number) for number in text.split()[1:]] for text in (one, other))
    return len(ours) == len(theirs) and all(abs(a - b) <= _MOVES for a, b in zip(ours, theirs, strict=True))
