"""Test which rotary tables are recognized as computable from the network's frequencies."""

import numpy as np
import pytest
import torch

from edgeopt.runtimes.genai.rotary import match_frequencies

FREQUENCIES = torch.tensor([1.0, 0.1, 0.013])


def table(function, scale: float = 1.0) -> torch.Tensor:
    """Compute the table with numpy in double precision."""
    rows = [[float(scale * function(position * float(f))) for f in FREQUENCIES] for position in range(50)]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize(("function", "name"), [(np.cos, "Cos"), (np.sin, "Sin")])
@pytest.mark.parametrize("scale", [1.0, 1.2])
def test_table_of_known_frequencies_matches(function, name, scale):
    candidates = [(torch.tensor([1.0, 0.5, 0.2]), 1.0), (FREQUENCIES, scale)]
    match = match_frequencies(table(function, scale), name, candidates)
    assert match is not None
    assert torch.equal(match[0], FREQUENCIES)
    assert match[1] == scale


def test_table_of_other_frequencies_does_not_match():
    assert match_frequencies(table(np.cos), "Cos", [(FREQUENCIES * 1.001, 1.0)]) is None
    assert match_frequencies(table(np.cos), "Cos", [(FREQUENCIES, 1.001)]) is None
    assert match_frequencies(table(np.cos), "Cos", [(FREQUENCIES[:2], 1.0)]) is None
    assert match_frequencies(table(np.cos), "Sin", [(FREQUENCIES, 1.0)]) is None
