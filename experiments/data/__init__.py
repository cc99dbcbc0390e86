"""Images for the experiments: deterministic streams of batches whose whole position is a step number."""
