"""The judge's parts, and what it returns."""
