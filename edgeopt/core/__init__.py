"""Define the plain data types that every package shares. Only the standard library is imported."""
