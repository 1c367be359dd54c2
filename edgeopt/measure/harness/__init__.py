"""Run probes in isolated processes."""
