"""Gates: each looks at one candidate and says with its evidence whether it may be released.

A gate is a part with a `check`, one file each; a policy names it by `_target_`.
"""
