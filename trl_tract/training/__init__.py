"""The trainer, its configuration and losses, the score head, what is logged and what looks wrong early."""
