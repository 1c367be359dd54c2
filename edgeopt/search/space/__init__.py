"""Define search spaces: parameters, conditions and the sweep definition."""
