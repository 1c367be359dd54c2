"""Describe this computer and observe it: inventory, bandwidth, processes, energy, device leases."""
