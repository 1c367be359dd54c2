"""Run probes in isolated processes and keep their raw samples."""
