"""Pareto fronts: non-dominated sorting, hypervolume, ranking and parameter importance."""
