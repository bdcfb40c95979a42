"""Whole runs: their steps, what is finished, and the folders that they write."""
