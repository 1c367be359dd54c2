"""Rotary tables: computed when an engine loads where the network's frequencies explain them, else stored."""

import numpy as np
import pytest
import torch

from edgeopt.runtimes.genai.rotary import match_frequencies

FREQUENCY = torch.tensor([1.0, 0.1, 0.013])


def table(function, scale: float = 1.0) -> torch.Tensor:
    """By numpy in double precision, position after position."""
    rows = [[float(scale * function(position * float(f))) for f in FREQUENCY] for position in range(50)]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize(("function", "name"), [(np.cos, "Cos"), (np.sin, "Sin")])
@pytest.mark.parametrize("scale", [1.0, 1.2])
def test_a_table_of_known_frequencies_is_explained(function, name, scale):
    known = [(torch.tensor([1.0, 0.5, 0.2]), 1.0), (FREQUENCY, scale)]
    found = match_frequencies(table(function, scale), name, known)
    assert found is not None
    assert torch.equal(found[0], FREQUENCY)
    assert found[1] == scale


def test_a_table_of_other_frequencies_another_scale_or_another_width_is_not_explained():
    assert match_frequencies(table(np.cos), "Cos", [(FREQUENCY * 1.001, 1.0)]) is None
    assert match_frequencies(table(np.cos), "Cos", [(FREQUENCY, 1.001)]) is None
    assert match_frequencies(table(np.cos), "Cos", [(FREQUENCY[:2], 1.0)]) is None
    assert match_frequencies(table(np.cos), "Sin", [(FREQUENCY, 1.0)]) is None
