"""Turn one recipe into one result: compress, build, measure and judge."""
