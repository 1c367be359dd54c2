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


def workload_of(folder, text=None, **values):
    defaults = {"context_length": 512, "prompt_lengths": (16, 64), "window_tokens": 100, "max_windows": 10}
    return build_workload(text or toy_bench.make_text(), folder, **{**defaults, **values})


@settings(max_examples=25, deadline=None)
@given(st.sets(st.sampled_from(PROMPT_LENGTHS), min_size=1), st.integers(17, 5000))
def test_prompts_fit_context_with_one_token(folder, lengths, context):
    lengths |= {16}
    workload = workload_of(folder, prompt_lengths=tuple(lengths), context_length=context)
    assert {n: len(ids) for n, ids in workload.prompts.items()} == {n: n for n in lengths if n < context}
    assert set(workload.skipped_prompt_lengths) == {n for n in lengths if n >= context}


def test_windows_are_evenly_spaced(folder):
    all_windows = tokenizer.windows(toy_bench.make_text(), folder, length=100)
    selected = workload_of(folder, max_windows=10).documents
    assert len(selected) == 10
    assert [all_windows.index(window) for window in selected] == [6 * i for i in range(10)]


def test_short_text_uses_all_windows(folder):
    assert workload_of(folder, max_windows=1000).documents == tokenizer.windows(
        toy_bench.make_text(), folder, length=100
    )


def test_changed_tokenizer_in_folder_changes_windows(tmp_path):
    folder = toy_bench.build(tmp_path, FakeRuntime()).directory
    before = workload_of(folder).documents
    assert workload_of(folder).documents == before
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
    file.write_text(json.dumps(words))
    swapped = {0: 1, 1: 0}
    assert workload_of(folder).documents == [[swapped.get(token, token) for token in window] for window in before]


def test_windows_fit_the_context(folder):
    assert max(map(len, workload_of(folder, context_length=40, prompt_lengths=(16,)).documents)) == 40


def test_context_shorter_than_prompts_is_rejected(folder):
    with pytest.raises(ConfigError, match="shorter than the context of 16 tokens"):
        workload_of(folder, context_length=16)


def test_text_shorter_than_window_is_rejected(folder):
    with pytest.raises(InputError, match="must have at least 16 token ids, got 2"):
        workload_of(folder, Text(name="tiny", documents=("w1 w2",)))


@given(st.lists(st.integers(), min_size=1, max_size=5), st.integers(0, 20))
def test_repeat_to_length_repeats_ids(ids, length):
    assert repeat_to_length(ids, length) == (ids * 20)[:length]
