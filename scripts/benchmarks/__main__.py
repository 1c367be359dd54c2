"""Run the benchmarks of edgeopt, mostly through its commands. scripts/bench starts this module.

    scripts/bench                 run all
    scripts/bench startup width   run some

All values are medians, and compared variants are interleaved in one run. baselines.py adds llama.cpp and Olive if they
are installed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    compression,
    engine,
    front,
    prepacked,
    prompt_lookup,
    release,
    runtimes,
    search,
    streaming,
    tracking,
)

BENCHMARKS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        engine.startup,
        engine.width,
        engine.width_246m,
        engine.agreement,
        engine.memory,
        engine.overhead,
        engine.estimate,
        engine.decode,
        runtimes.runtimes,
        runtimes.blocks,
        prompt_lookup.guesses,
        prepacked.prepacked,
        streaming.streaming,
        streaming.context,
        compression.rounding,
        compression.recovery,
        compression.eight_bits,
        compression.time_budget,
        compression.effort,
        search.machinery,
        search.ten_thousand,
        search.kills,
        front.front,
        release.releases,
        release.service,
        tracking.logging,
        tracking.five_thousand,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], default=list(BENCHMARKS), metavar="NAME")
    for name in parser.parse_args().names:
        print(f"## {name}: {(BENCHMARKS[name].__doc__ or '').strip()}\n", flush=True)
        with tempfile.TemporaryDirectory(prefix="edgeopt-bench-") as folder:
            BENCHMARKS[name](Path(folder))


if __name__ == "__main__":
    main()
