"""Files that survive a killed process: atomic JSON, blocks of work, fingerprints of models, checkpoints."""
