"""Compare trials: Pareto fronts, hypervolume, ranking and parameter importance."""
