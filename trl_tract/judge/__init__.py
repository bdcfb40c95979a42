"""Judging: a rationale, then the expected score; and a judge as a reward."""
