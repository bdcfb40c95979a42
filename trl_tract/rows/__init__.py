"""Where rows come from, and how a row becomes text, token ids and the place of its score."""
