"""Where checkpoints come from: one file a source."""
