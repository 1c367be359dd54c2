"""Provide the plugins that MLflow loads by entry points: tags, deployments, evaluation and pages."""
