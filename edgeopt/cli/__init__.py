"""Parse the command line, call the API or a study, and print."""
