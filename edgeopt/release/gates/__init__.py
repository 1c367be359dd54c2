"""Decide, with evidence, if a candidate may be released.

A gate is a config object with a method `check`, see edgeopt.release.candidate.Gate. Each gate has its own file, and a
policy names it by `_target_`.
"""
