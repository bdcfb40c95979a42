"""Text that people look at: made safe, as Markdown, in colour, as progress."""
