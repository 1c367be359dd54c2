"""Recovery: training that wins back what compression lost, one file a technique."""
