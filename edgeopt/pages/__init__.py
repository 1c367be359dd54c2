"""Serve read-only pages for running studies, trials side by side, and releases, next to the pages of MLflow."""
