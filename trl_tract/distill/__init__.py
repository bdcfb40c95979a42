"""Rationales: the model writes them, they are checked, and each outcome is recorded."""
