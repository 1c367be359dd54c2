"""Store trials in SQLite or PostgreSQL."""
