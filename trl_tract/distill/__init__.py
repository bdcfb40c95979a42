"""Self-written rationales: how they come about, what can be wrong with them, what became of each."""
