"""Quantization steps and the rounding methods that they use."""
