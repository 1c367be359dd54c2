"""What ONNX Runtime is told when it opens a graph on a CPU, the same for each runtime that is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgeopt.errors import ConfigError
from edgeopt.runtimes import lookup

MappedWeights = Literal["on_demand", "prefaulted", "locked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """How an engine's graph is opened, and how its weights come into memory.

    Attributes:
        spinning: threads wait for work by computing nothing, which is fast and takes a core each.
        prepacked: weights are copied into the layout that kernels multiply fastest; else they stay mapped as they are.
        packed_on_disk: the engine has them in that layout too: opened sooner, and one copy for all processes. The file
            takes about twice as much.
        huge_pages: what was copied is joined to pages of 2 MiB once the engine is open, which makes a token faster.
        mapped_weights: when weights that stay in the file come into memory: as they are needed (`on_demand`), when the
            engine is opened (`prefaulted`), or then and for as long as it is open (`locked`).
        prompt_lookup: tokens that are guessed at once, as what followed the last ones when they stood in the text
            before (edgeopt.runtimes.lookup); what is generated is the same. 0: none.
        arena: memory for intermediate results is kept for the next call.
    """

    KNOBS: ClassVar[frozenset[str]] = frozenset(
        {"spinning", "prepacked", "huge_pages", "mapped_weights", "prompt_lookup", "arena"}
    )
    """Those that decide how an engine is opened alone."""
    spinning: bool = True
    prepacked: bool = True
    packed_on_disk: bool = False
    huge_pages: bool = False
    mapped_weights: MappedWeights = "on_demand"
    prompt_lookup: int = 0
    arena: bool = True

    def __post_init__(self) -> None:
        lookup.check(self.prompt_lookup)
        if self.mapped_weights != "on_demand" and self.prepacked and not self.packed_on_disk:
            raise ConfigError(
                "weights are copied from the file, and none of it stays mapped",
                place="mapped_weights",
                mend="Give on_demand, packed_on_disk=true or prepacked=false",
            )
        for name, wanted in {"packed_on_disk": self.packed_on_disk, "huge_pages": self.huge_pages}.items():
            if wanted and not self.prepacked:
                raise ConfigError(
                    "weights stay as they are in the file", place=name, mend="Give false, or prepacked=true"
                )

    @property
    def entries(self) -> Mapping[str, str]:
        """Entries of a session's config. Specification: onnxruntime_session_options_config_keys.h."""
        return {
            "session.intra_op.allow_spinning": str(int(self.spinning)),
            "session.disable_prepacking": str(int(not self.prepacked)),
        }
