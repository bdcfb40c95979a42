"""Whole runs: their steps, what is finished, and the folders they leave."""
