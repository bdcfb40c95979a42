"""What outlives a killed process: JSON written whole, blocks of work, fingerprints of models, checkpoints."""
