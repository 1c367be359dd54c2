"""Evaluate one recipe: compress, build, measure and judge."""
