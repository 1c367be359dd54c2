"""Compression techniques, one file each, and the tensor mathematics that they share."""
