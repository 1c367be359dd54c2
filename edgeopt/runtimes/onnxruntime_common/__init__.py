"""Share session options, prepacked weights and memory mapping between the runtimes built on ONNX Runtime."""
