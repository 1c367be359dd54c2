"""Run models on onnxruntime-genai and its fused kernels."""
