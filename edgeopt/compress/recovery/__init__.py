"""Train a compressed model to recover quality, one technique per file."""
