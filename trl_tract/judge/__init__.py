"""Rationale, then expected score; and a judge as a reward."""
