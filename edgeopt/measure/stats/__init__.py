"""Compute confidence intervals, divergences and aggregates of samples."""
