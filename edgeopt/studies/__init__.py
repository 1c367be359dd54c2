"""Open, launch, record and close studies: the service under the Python API and the command line."""
