"""Measure engines: probes, the isolated process in which they run, and the statistics of their samples."""
