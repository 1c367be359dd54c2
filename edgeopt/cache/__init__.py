"""Content-addressed stage cache: the same step on the same input is done once, and what nobody needs makes room.

    KIND/KEY      a stage, whole and never changed
    drafts/KEY    the state of unfinished work
    scratch/KEY   a stage while it is produced or removed; of a dead process it is waste
    locks/KEY     locked by the one process that produces the stage
    uses/KEY      locked, shared, by every process that uses the entry; its time of change is the last use,
                  and in it stand the seconds that the stage took to make

The kernel drops the locks of a process that dies, so nothing has to be cleaned up after a kill. Files that
are locked stay for ever, since somebody may wait on them; they hold a number at most.
"""

from edgeopt.cache.stage_cache import Stage, StageCache, code_digest

__all__ = ["Stage", "StageCache", "code_digest"]
