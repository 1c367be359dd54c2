"""Define the plain data that every package shares; needs only the standard library."""
