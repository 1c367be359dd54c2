"""Compose Hydra configs, parse them into typed values, and assemble jobs from them."""
