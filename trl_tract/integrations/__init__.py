"""Where judges work: behind HTTP and inside evaluation frameworks."""
