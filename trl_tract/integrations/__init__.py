"""Judges as services and scorers: HTTP, inspect_ai, MLflow."""
