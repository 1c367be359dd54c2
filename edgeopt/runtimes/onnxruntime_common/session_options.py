"""Define the session options shared by the runtimes that are built on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgeopt.errors import ConfigError
from edgeopt.runtimes.decoding import chunked_prefill, prompt_lookup
from edgeopt.runtimes.onnxruntime_common import thread_affinity

MappedWeights = Literal["on_demand", "prefaulted", "locked"]
OPTIMIZATION_LEVELS: Mapping[str, str] = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}
"""ONNX Runtime's name of each `graph_optimization` level."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """Options of a CPU session: threads, memory, graph optimization and decoding.

    Attributes:
        spinning: idle threads busy-wait for work. This is fast and occupies one core per thread.
        prepacked: copy the weights into the layout that the kernels multiply fastest. If false, they stay mapped from
            the file unchanged.
        packed_on_disk: store the prepacked weights in the engine, too. It opens faster and processes share one copy,
            but the file takes about twice the space.
        huge_pages: collapse the copied weights into pages of 2 MiB after opening, which makes decoding faster.
        mapped_weights: when weights that stay in the file are read into memory: on first use (`on_demand`), on opening
            (`prefaulted`), or on opening and locked there (`locked`).
        prompt_lookup: draft tokens verified in one call (edgeopt.runtimes.decoding.prompt_lookup). The output does not
            change. 0 disables it.
        prompt_tokens: prompt tokens computed in one call (chunked prefill). Larger chunks need more memory for
            activations, and are faster if the weights are streamed from storage. Models whose rotary embeddings depend
            on the prompt length (LongRoPE, dynamic) read the prompt at once.
        arena: keep the memory of intermediate results for the next call.
        affinity: logical processors in taskset syntax, such as `0,2` or `4-7`. Each thread is pinned to one of them, in
            this order. None: the operating system schedules the threads.
        graph_optimization: optimizations on opening: constant folding (`basic`), plus operator fusion (`extended`),
            plus layout optimization (`all`). With `none`, rotary tables and the conversion of fp16 weights are
            recomputed for each token.
    """

    SESSION_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {
            *("spinning", "prepacked", "huge_pages", "mapped_weights", "prompt_lookup", "arena"),
            *("affinity", "graph_optimization", "prompt_tokens"),
        }
    )
    """Fields that affect how an engine is opened and not which files it has."""
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
        prompt_lookup.check(self.prompt_lookup, chunk_tokens=self.prompt_tokens)
        if self.affinity is not None:
            thread_affinity.parse(self.affinity)
        if self.graph_optimization != "all" and self.packed_on_disk:
            raise ConfigError(
                "`graph_optimization` must be all with packed_on_disk=true, which stores the optimized graph; "
                f"got {self.graph_optimization}",
                location="graph_optimization",
                hint="Use all, or packed_on_disk=false",
            )
        if self.mapped_weights != "on_demand" and self.prepacked and not self.packed_on_disk:
            raise ConfigError(
                "`mapped_weights` must be on_demand with prepacked=true, which copies the weights out of the file; "
                f"got {self.mapped_weights}",
                location="mapped_weights",
                hint="Use on_demand, packed_on_disk=true or prepacked=false",
            )
        for name, enabled in {"packed_on_disk": self.packed_on_disk, "huge_pages": self.huge_pages}.items():
            if enabled and not self.prepacked:
                raise ConfigError(
                    f"`{name}` needs prepacked weights, got prepacked=false",
                    location=name,
                    hint="Use false, or prepacked=true",
                )

    def config_entries(self, threads: int) -> Mapping[str, str]:
        """Return the config entries of a session. Specification: onnxruntime_session_options_config_keys.h.

        Raises BuildError for the reasons of `processors`.
        """
        affinities = thread_affinity.config_entry(self.cpu_ids(threads))
        return {
            "session.intra_op.allow_spinning": str(int(self.spinning)),
            "session.disable_prepacking": str(int(not self.prepacked)),
            **({"session.intra_op_thread_affinities": affinities} if affinities else {}),
        }

    def cpu_ids(self, threads: int) -> tuple[int, ...]:
        """Return the processor of each thread, the calling thread first; empty if `affinity` is None.

        Raises BuildError if there are too few processors or this process is not allowed to use one of them.
        """
        return () if self.affinity is None else thread_affinity.assign(thread_affinity.parse(self.affinity), threads)
