"""Pruning: parts or single weights leave the network, one file a technique."""
