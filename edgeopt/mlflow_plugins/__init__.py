"""What stock MLflow finds of edgeopt by entry points."""
