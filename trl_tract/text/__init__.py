"""Text for people: made safe, as Markdown, in colour, as progress."""
