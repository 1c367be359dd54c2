from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import toy_bench

from edgeopt.checkpoints import tokenizer
from edgeopt.core.corpus import Text
from edgeopt.errors import ConfigError, InputError
from edgeopt.measure.harness.fake_runtime import FakeRuntime
from edgeopt.measure.harness.workload import PROMPT_LENGTHS, build_workload, repeat_to_length


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_bench.build(tmp_path_factory.mktemp("toy"), FakeRuntime()).directory


def made(folder, text=None, **values):
    usual = {"context_length": 512, "prompt_lengths": (16, 64), "window_tokens": 100, "max_windows": 10}
    return build_workload(text or toy_bench.text(), folder, **{**usual, **values})


@settings(max_examples=25, deadline=None)
@given(st.sets(st.sampled_from(PROMPT_LENGTHS), min_size=1), st.integers(17, 5000))
def test_each_prompt_has_its_length_and_leaves_room_for_a_token(folder, lengths, context):
    lengths |= {16}
    workload = made(folder, prompt_lengths=tuple(lengths), context_length=context)
    assert {n: len(ids) for n, ids in workload.prompts.items()} == {n: n for n in lengths if n < context}
    assert set(workload.left_out) == {n for n in lengths if n >= context}


def test_windows_are_taken_evenly_over_the_whole_text(folder):
    everything = tokenizer.windows(toy_bench.text(), folder, length=100)
    some = made(folder, max_windows=10).documents
    assert len(some) == 10
    assert [everything.index(window) for window in some] == [6 * i for i in range(10)]


def test_a_short_text_gives_all_its_windows(folder):
    assert made(folder, max_windows=1000).documents == tokenizer.windows(toy_bench.text(), folder, length=100)


def test_another_tokenizer_in_the_same_folder_makes_other_windows(tmp_path):
    folder = toy_bench.build(tmp_path, FakeRuntime()).directory
    before = made(folder).documents
    assert made(folder).documents == before
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
    file.write_text(json.dumps(words))
    swapped = {0: 1, 1: 0}
    assert made(folder).documents == [[swapped.get(token, token) for token in window] for window in before]


def test_no_window_is_longer_than_the_context(folder):
    assert max(map(len, made(folder, context_length=40, prompt_lengths=(16,)).documents)) == 40


def test_a_context_that_holds_no_prompt_is_refused(folder):
    with pytest.raises(ConfigError, match="16 tokens holds none"):
        made(folder, context_length=16)


def test_a_text_below_one_window_is_refused(folder):
    with pytest.raises(InputError, match="shorter"):
        made(folder, Text(name="tiny", documents=("w1 w2",)))


@given(st.lists(st.integers(), min_size=1, max_size=5), st.integers(0, 20))
def test_cycling_repeats(ids, length):
    assert repeat_to_length(ids, length) == (ids * 20)[:length]
