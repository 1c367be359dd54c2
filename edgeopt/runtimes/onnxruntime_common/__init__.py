"""Share session options, weight packing and memory mapping between the ONNX Runtime runtimes."""
