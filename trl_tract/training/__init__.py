"""The trainers, their configuration and losses, the score head, what is logged, and early warnings."""
