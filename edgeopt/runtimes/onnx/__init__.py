"""Run any supported decoder as standard ONNX on ONNX Runtime."""
