"""The trainer's parts: the score head, what is logged, what is warned of."""
