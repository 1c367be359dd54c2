"""Build and run TensorRT engines, or write a build plan where no GPU is present."""
