"""Cache stages by the digest of their inputs, and evict the least recently used ones.

    KIND/KEY      a stage: complete and immutable
    drafts/KEY    state of unfinished work, kept for resuming
    scratch/KEY   a stage while it is produced or removed; garbage if the process died
    locks/KEY     locked by the process that produces the stage
    uses/KEY      locked (shared) by every process that uses the entry; the modification time is the last use,
                  and the content is the cost of the stage in seconds

The kernel releases the locks of a process that dies, so a kill needs no cleanup. Lock files are never deleted, because
another process may wait on them. Each holds at most one number.
"""

from edgeopt.cache.stage_cache import Stage, StageCache, code_digest

__all__ = ["Stage", "StageCache", "code_digest"]
