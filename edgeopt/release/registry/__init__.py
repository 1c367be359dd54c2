"""Read and write registered models in the MLflow registry."""
