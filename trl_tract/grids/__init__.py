"""What a grid of scores is made of: its trie, branches behind a text, several grids in one completion."""
