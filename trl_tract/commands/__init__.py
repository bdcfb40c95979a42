"""The command line's parts: each command, its options, and what is shown before anything is trained."""
