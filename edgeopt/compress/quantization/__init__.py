"""Quantization: matrices, activations, keys and values in few bits, one file a technique."""
