"""Run models as GGUF files on llama.cpp."""
