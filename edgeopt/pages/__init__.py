"""Pages beside MLflow's own: studies while they run, runs side by side, and releases. They read, and change nothing."""
