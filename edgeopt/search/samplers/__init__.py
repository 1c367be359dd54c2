"""Propose the next recipe to try."""
