"""What ONNX Runtime is told when it opens a graph, the same for each runtime that is built on it."""

from __future__ import annotations

from collections.abc import Mapping

from edgeopt.errors import ConfigError


def entries(*, spinning: bool, prepacked: bool) -> Mapping[str, str]:
    """Entries of a session's config. Specification: onnxruntime_session_options_config_keys.h.

    Args:
        spinning: threads wait for work by computing nothing, which is fast and takes a core each.
        prepacked: weights are copied into the layout that kernels multiply fastest; else they stay mapped.
    """
    return {
        "session.intra_op.allow_spinning": str(int(spinning)),
        "session.disable_prepacking": str(int(not prepacked)),
    }


def require_copies(*, prepacked: bool, packed_on_disk: bool, huge_pages: bool) -> None:
    """ConfigError where a knob is about packed weights, and there are none."""
    for name, wanted in {"packed_on_disk": packed_on_disk, "huge_pages": huge_pages}.items():
        if wanted and not prepacked:
            raise ConfigError("weights stay as they are in the file", place=name, mend="Give false, or prepacked=true")
