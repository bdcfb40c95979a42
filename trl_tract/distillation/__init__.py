"""What can be wrong with a self-written rationale, and what became of all of them."""
