"""The parts of the command line: each command, its options, and what is shown before training starts."""
