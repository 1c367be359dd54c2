"""Measure one aspect of an engine, one file per probe."""
