"""Probes, the isolated child process that they run in, and the exclusive lease on the device."""
