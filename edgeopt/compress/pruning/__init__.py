"""Remove parts of a network or set single weights to zero, one technique per file."""
