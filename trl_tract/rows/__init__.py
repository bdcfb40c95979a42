"""One row: its text, its token ids, its gold scores, the model's columns."""
