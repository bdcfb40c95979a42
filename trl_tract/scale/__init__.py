"""A score as text, as tokens and as a number: marker, grid, trie, expected score."""
