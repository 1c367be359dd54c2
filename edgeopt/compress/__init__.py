"""Compression techniques: one file a technique, beside the tensor mathematics that they share."""
