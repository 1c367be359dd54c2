"""Runtimes: each builds engines from checkpoints and opens them."""
