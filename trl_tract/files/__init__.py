"""What outlives a killed process: JSON written whole, journals of blocks, checkpoints to go on from."""
