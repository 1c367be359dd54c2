"""Describe this machine and observe it: hardware, bandwidth, processes, energy, contention and device leases."""
