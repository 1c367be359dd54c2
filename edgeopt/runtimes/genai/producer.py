"""Read and replace the builder revision that onnxruntime-genai stamps into the graphs of an engine.

The stock builder stamps the commit of whatever git repository surrounds its installation. Two checkouts would therefore
build engines with different digests from the same recipe. edgeopt stamps the published revision of the package instead.
Engines of earlier versions carry the commit of the checkout; `stamp` reproduces them.
"""

from __future__ import annotations

from pathlib import Path

from edgeopt.runtimes.genai.layout import GENERATION_GRAPH, SCORING_GRAPH

GRAPHS = (GENERATION_GRAPH, SCORING_GRAPH)
_REVISION_LENGTH = 7


def published_commit() -> str:
    """Return the source revision from which the installed onnxruntime-genai package was built."""
    import onnxruntime_genai

    return str(onnxruntime_genai.__commit__)


def stamp(directory: Path, commit: str) -> None:
    """Replace the revision in the graphs of an engine by the first seven characters of `commit`.

    The bytes of the graphs stay the same otherwise.
    """
    import onnx

    for path in (directory / name for name in GRAPHS):
        before = onnx.load(path, load_external_data=False).producer_version
        version, _, revision = before.partition("+")
        after = f"{version}+{commit[:_REVISION_LENGTH]}"
        if len(revision) != _REVISION_LENGTH or len(after) != len(before):
            continue
        path.write_bytes(path.read_bytes().replace(before.encode(), after.encode(), 1))
