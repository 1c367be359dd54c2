"""Read and write a model's weights and tokenizer, on disk and as a PyTorch network."""
