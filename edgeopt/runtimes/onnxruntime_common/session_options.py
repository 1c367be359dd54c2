"""What ONNX Runtime is told when it opens a graph on a CPU, the same for each runtime that is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgeopt.errors import ConfigError
from edgeopt.runtimes.decoding import chunked_prefill
from edgeopt.runtimes.decoding import prompt_lookup as lookup
from edgeopt.runtimes.onnxruntime_common import thread_affinity as affinity

MappedWeights = Literal["on_demand", "prefaulted", "locked"]
LEVELS: Mapping[str, str] = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}
"""How ONNX Runtime calls what it does to a graph when it opens it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
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
            before (edgeopt.runtimes.decoding.prompt_lookup); what is generated is the same. 0: none.
        prompt_tokens: of a prompt that are computed at once: more take memory for activations, and are faster where
            weights are read from storage for each time. Models whose rotary tables depend on the length of the prompt
            (LongRoPE, dynamic) read it as a whole.
        arena: memory for intermediate results is kept for the next call.
        affinity: logical processors as taskset takes them, such as `0,2` or `4-7`, of which the first thread computes
            on the first alone, the second on the second, and so on. None: the kernel moves threads as it likes.
        graph_optimization: what ONNX Runtime does to a graph when it opens it: computes what is constant (`basic`),
            fuses operators, too (`extended`), and chooses layouts (`all`). With `none` rotary tables and weights in
            fp16 are computed anew for each token.
    """

    KNOBS: ClassVar[frozenset[str]] = frozenset(
        {
            *("spinning", "prepacked", "huge_pages", "mapped_weights", "prompt_lookup", "arena"),
            *("affinity", "graph_optimization", "prompt_tokens"),
        }
    )
    """Those that decide how an engine is opened alone."""
    spinning: bool = True
    prepacked: bool = True
    packed_on_disk: bool = False
    huge_pages: bool = False
    mapped_weights: MappedWeights = "on_demand"
    prompt_lookup: int = 0
    prompt_tokens: int = chunked_prefill.CHUNK_TOKENS
    arena: bool = True
    affinity: str | int | None = None
    graph_optimization: Literal["all", "extended", "basic", "none"] = "all"

    def __post_init__(self) -> None:
        chunked_prefill.check(self.prompt_tokens)
        lookup.check(self.prompt_lookup, at_once=self.prompt_tokens)
        if self.affinity is not None:
            affinity.parse(self.affinity)
        if self.graph_optimization != "all" and self.packed_on_disk:
            raise ConfigError(
                "the graph is optimized already where its weights are packed on disk",
                location="graph_optimization",
                hint="Give all, or packed_on_disk=false",
            )
        if self.mapped_weights != "on_demand" and self.prepacked and not self.packed_on_disk:
            raise ConfigError(
                "weights are copied from the file, and none of it stays mapped",
                location="mapped_weights",
                hint="Give on_demand, packed_on_disk=true or prepacked=false",
            )
        for name, wanted in {"packed_on_disk": self.packed_on_disk, "huge_pages": self.huge_pages}.items():
            if wanted and not self.prepacked:
                raise ConfigError(
                    "weights stay as they are in the file", location=name, hint="Give false, or prepacked=true"
                )

    def entries(self, threads: int) -> Mapping[str, str]:
        """Entries of a session's config. Specification: onnxruntime_session_options_config_keys.h.

        Raises BuildError as `processors`.
        """
        others = affinity.entry(self.processors(threads))
        return {
            "session.intra_op.allow_spinning": str(int(self.spinning)),
            "session.disable_prepacking": str(int(not self.prepacked)),
            **({"session.intra_op_thread_affinities": others} if others else {}),
        }

    def processors(self, threads: int) -> tuple[int, ...]:
        """The processor of each thread, first that of the one that calls; none where they are not chosen.

        BuildError where they are too few, or this process may not use them.
        """
        return () if self.affinity is None else affinity.choose(affinity.parse(self.affinity), threads)
