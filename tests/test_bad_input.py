"""Check that bad input ends in one line on stderr with location, value and hint, and in the right exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import samples

from edgeopt.cli.commands import doctor, front
from edgeopt.cli.main import main
from edgeopt.config import assemble, parse, trial_process
from edgeopt.core.artifact import Checkpoint
from edgeopt.errors import ConfigError
from edgeopt.studies import terminal
from edgeopt.studies.open_study import OpenStudy

ErrorOf = Callable[..., str]
COMMANDS = ("run", "sweep", "front", "promote", "predict", "profile", "bench", "generate", "cache", "doctor")
HEAVY = {"torch", "transformers", "mlflow", "optuna", "hydra", "onnxruntime", "rich", "yaml", "numpy"}
LONG = "The quick brown fox jumps over the lazy dog, again and again. " * 40


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the test's own working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> ErrorOf:
    """Return a function that runs a failing command and returns its only line on stderr.

    The function checks the exit code and that stdout is empty.
    """

    def run(*arguments: str, code: int = 2) -> str:
        capsys.readouterr()
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("edgeopt: ")
        assert not [noise for noise in ("Traceback", "search path", "full_key", "$KEY", "--debug") if noise in line]
        return line.removeprefix("edgeopt: ")

    return run


CONFIG: dict[str, tuple[list[str], list[str]]] = {
    "misspelt key of a step": (
        ["recipe=prune", "step.prune.ratoi=0.2"],
        ["step.prune.ratoi: ", "Did you mean step.prune.ratio?"],
    ),
    "misspelt group": (["recpie=int4"], ["recpie: ", "Did you mean recipe?"]),
    "misspelt first part of a key": (["modle.path=x"], ["modle.path: ", "Did you mean model.path?"]),
    "misspelt choice": (["recipe=prune_lora_in4"], ["recipe: ", "Did you mean prune_lora_int4?", "baseline"]),
    "misspelt deletion": (["~limitz"], ["limitz: ", "Did you mean limits?"]),
    "misspelt group of the defaults list": (["txt@calibration=file"], ["txt", "Did you mean text?"]),
    "key of a step that the recipe lacks": (["recipe=int4", "step.prune.ratio=0.1"], ["step has: quantize"]),
    "unknown key without a similar one": (["zzz=1"], ["zzz: there is no such key", "limits"]),
    "added key that is not read": (["+zzz=1"], ["zzz: edgeopt does not read this key"]),
    "step without +": (["step@step.q=int4"], ["Add it by +step@step.q=CHOICE"]),
    "override without =": (["int4"], ["key=value, got 'int4'", "key=value"]),
    "invalid override": (["recipe=[a"], ["'recipe=[a' cannot be parsed", "quote"]),
    "unquoted =": (["state=a=b"], ["'state=a=b' cannot be parsed", "quote"]),
    "runtime without predictions": (["runtime=torch"], ["runtime: ", "Torch", "edgeopt run"]),
    "two choices": (["recipe=int4,int8"], ["recipe=int4,int8", "one value"]),
    "no choice": (["model=null"], ["model=null: ", "GROUP=CHOICE"]),
    "missing value": (["model=local"], ["model.path: a value is required", "model.path="]),
    "deleted required key": (["~model"], ["model: a required key is missing"]),
    "unknown interpolation": (["limits.memory.peak_rss_mib=${nope}"], ["limits.memory.peak_rss_mib: ", "'nope'"]),
    "no state": (["state=null"], ["state: `state` must be the path of a folder", "got None"]),
    "cache limit without unit": (["cache.limit=20"], ["cache.limit: the value must have a unit, got 20", "GiB"]),
    "cache limit below zero": (
        ["cache.limit=-1 GiB"],
        ["cache.limit: the size must not be negative, got '-1 GiB'", "0 B or more"],
    ),
    "cache limit that is not a quantity": (
        ["cache.limit=[1]"],
        ["cache.limit: the value must be a quantity, got [1]", "GiB"],
    ),
    "cache limit of another dimension": (
        ["cache.limit=3 ms"],
        ["cache.limit: the value must have a unit of size, got '3 ms'", "GiB"],
    ),
    "misspelt cache limit": (["cache.limt=3 GiB"], ["cache.limt: ", "Did you mean cache.limit?"]),
    "cache that is not a mapping": (["cache=3"], ["cache: `cache` must be a mapping", "Set cache.limit"]),
    "unknown metric": (
        ["limits.memory.peek_rss_mib=3 GiB"],
        ["unknown metric 'memory/peek_rss_mib'", "Did you mean memory/peak_rss_mib?"],
    ),
    "unknown metric in a target": (
        ["target=sbc_4gib", "limits.size.engine=3 GiB"],
        ["limits.size.engine: ", "size/engine_mib"],
    ),
    "limit without unit": (
        ["limits.memory.peak_rss_mib=3000"],
        ["limits.memory.peak_rss_mib: the value must have a unit, got 3000", "GiB"],
    ),
    "limit with an unknown unit": (["limits.memory.peak_rss_mib=3 GoB"], ["'3 GoB'", "GiB"]),
    "limit of another dimension": (
        ["limits.memory.peak_rss_mib=3 ms"],
        ["must have a unit of size, got '3 ms' with a unit of time", "GiB"],
    ),
    "limit that is not a quantity": (["limits.memory.peak_rss_mib=lots"], ["must be a quantity, got 'lots'", "GiB"]),
    "limit below zero": (["limits.memory.peak_rss_mib=-3 MiB"], ["the limit must be above 0, got '-3 MiB'"]),
    "limits that are not a mapping": (["limits=3"], ["limits: `limits` must be a mapping", "got 3"]),
    "ratio above 1": (
        ["recipe=prune", "step.prune.ratio=1.5"],
        ["step.prune.ratio: ", "must be between 0 and 1, got 1.5"],
    ),
    "ratio of 0": (
        ["recipe=heads_int4", "step.prune.ratio=0.0"],
        ["step.prune.ratio: ", "must be between 0 and 1, got 0.0"],
    ),
    "ratio that is text": (
        ["recipe=prune", "step.prune.ratio=abc"],
        ["step.prune.ratio: `ratio` must be a number, got 'abc'"],
    ),
    "rank above 64": (
        ["recipe=prune_lora", "step.lora.rank=99"],
        ["step.lora.rank: `rank` must be from 2 to 64, got 99"],
    ),
    "rank below 2": (
        ["recipe=prune_lora", "step.lora.rank=1"],
        ["step.lora.rank: `rank` must be from 2 to 64, got 1."],
    ),
    "unsupported block size": (
        ["recipe=int4", "step.quantize.block_size=48"],
        ["step.quantize.block_size: ", "must be one of 16, 32"],
    ),
    "block size that does not divide the matrix side": (
        ["recipe=prune_int4", "step.quantize.block_size=256", "step.prune.multiple=32", "step.prune.ratio=0.2"],
        ["step.quantize.block_size: `block_size` must divide the matrix side", "16, 32"],
    ),
    "unknown rounding": (["recipe=int4", "rounding=gtpq"], ["rounding: ", "Did you mean gptq?"]),
    "rounding by name inside a step": (
        ["recipe=int4", "step.quantize.rounding=gptq"],
        ["step.quantize.rounding: `rounding` must be a mapping", "got 'gptq'", "rounding=gptq"],
    ),
    "pattern that matches no unit": (
        ["recipe=int4", "step.quantize.overrides={layers.9.*: int8}"],
        ["step.quantize.overrides: no unit matches the pattern 'layers.9.*'", "layers.3.down"],
    ),
    "unknown type of weights": (
        ["recipe=int4", "step.quantize.overrides={*.qkv: int3}"],
        ["step.quantize.overrides.*.qkv: ", "float, int2, int4, int8; got 'int3'"],
    ),
    "lora after quantize": (
        ["recipe=prune_lora_int4", "order=[prune,quantize,lora]"],
        ["order: lora cannot follow quantize", "Put lora before quantize"],
    ),
    "step that is not in order": (
        ["recipe=prune_lora_int4", "order=[prune,quantize]"],
        ["step.lora: ", "order=[prune,quantize,lora]"],
    ),
    "order with a step that is not configured": (["recipe=int4", "order=[prune,quantize]"], ["order: step 'prune'"]),
    "misspelt step in order": (["recipe=int4", "order=[quantise]"], ["order: ", "Did you mean quantize?"]),
    "misspelt package of a step": (["recipe=int4", "step@step.quantise=int8"], ["Did you mean step@step.quantize?"]),
    "order that is not a list": (["order=3"], ["order: `order` must be a list", "got 3"]),
    "foreign target": (["+step.a={_target_:os.system,command:ls}", "order=[a]"], ["step.a: ", "'os.system'"]),
    "missing task folder": (
        ["+probe@measure.probes.tasks=tasks", "measure.probes.tasks.path=/absent", "measure.probes.tasks.names=[a]"],
        ["measure.probes.tasks", "/absent" if find_spec("lm_eval") else "pip install 'edgeopt[tasks]'"],
    ),
    "probe that is a number": (["measure.probes.size=3"], ["measure.probes.size: `_target_` must be a probe, got int"]),
    "affinity that is not a list of processors": (
        ["runtime.affinity=big"],
        ["runtime.affinity: `affinity` must be a list of processors, got 'big'", "0,2 or 4-7"],
    ),
    "unknown graph optimization": (
        ["runtime.graph_optimization=most"],
        ["runtime.graph_optimization: `graph_optimization` must be one of all, extended, basic, none; got 'most'"],
    ),
    "missing folder of configs": (
        ["--config-dir", "nope"],
        ["--config-dir: `--config-dir` must be a folder, got 'nope'"],
    ),
}


@pytest.mark.parametrize("case", CONFIG)
def test_bad_config_is_rejected(case: str, error_of: ErrorOf, work: Path) -> None:
    overrides, expected = CONFIG[case]
    line = error_of("predict", *overrides)
    assert [part for part in expected if part not in line] == [], line
    assert list(work.iterdir()) == [], "a rejected command writes no files"


SWEEP: dict[str, tuple[list[str], list[str]]] = {
    "misspelt sweep": (["--config-name", "referenec"], ["--config-name: ", "'referenec'", "Did you mean reference?"]),
    "config that is not a sweep": (["--config-name", "config"], ["search: nothing is configured"]),
    "misspelt direction": (
        ["search.objectives={latency/decode_p50_ms: minimise}"],
        ["search.objectives.latency/decode_p50_ms: ", "minimize or maximize, got 'minimise'"],
    ),
    "unknown metric in objectives": (
        ["++search.objectives={quality/perplexty: minimize}"],
        ["search.objectives.quality/perplexty", "quality/perplexity"],
    ),
    "objective that is not measured": (
        ["measure.probes.quality=null", "model=local", "model.path={tiny}"],
        ["search.objectives.quality/perplexity: the objective quality/perplexity is not measured", "null"],
    ),
    "no objective left": (
        ["search.objectives={quality/perplexity: null, latency/decode_p50_ms: null, size/engine_mib: null}"],
        ["search.objectives: `objectives` must set the direction of at least one metric"],
    ),
    "unknown metric in limits": (["limits.size.engine_mbi=3 MiB"], ["'size/engine_mbi'", "size/engine_mib"]),
    "limit without unit": (["limits.size.engine_mib=3"], ["limits.size.engine_mib: the value must have a unit, got 3"]),
    "enqueued outside the space": (["search.enqueue=[{recipe: int3}]"], ["search.enqueue: ", "got 'int3' for recipe"]),
    "enqueued without a parameter": (["search.enqueue=[{recipe: int4}]"], ["search.enqueue: ", "block_size"]),
    "enqueued number": (["search.enqueue=[3]"], ["search.enqueue[0]: `enqueue[0]` must be a mapping, got 3"]),
    "unknown sampler": (
        ["search.sampler=tpee"],
        ["search.sampler: `sampler` must be one of ", "tpe, nsga2, gp, random; got 'tpee'", "Did you mean tpe?"],
    ),
    "no trials": (["search.trials=0"], ["search.trials: `trials` must be at least 1, got 0"]),
    "study with a slash": (["search.study=a/b"], ["search.study: `study` must be a name without slashes, got 'a/b'"]),
    "parameter that is a number": (
        ["search.parameters.recipe=3"],
        ["search.parameters.recipe: ", "must be a mapping, got 3"],
    ),
    "unknown policy": (["promote=nope", "model=local", "model.path={tiny}"], ["nope.yaml", "default.yaml"]),
    "parameter that is not a key": (
        ["+search.parameters.recipes={choices: [int4], when: {recipe: [prune_int4]}}"],
        ["recipes: ", "Did you mean recipe?"],
    ),
    "choice that does not exist": (["search.parameters.recipe.choices=[int8,int44]", "search.enqueue=[]"], ["int44"]),
    "misspelt override": (["serch.trials=3"], ["serch.trials: ", "Did you mean search.trials?"]),
}


@pytest.mark.parametrize("case", SWEEP)
def test_bad_sweep_is_rejected_before_its_first_trial(
    case: str, error_of: ErrorOf, work: Path, tiny_model: Path
) -> None:
    overrides, expected = SWEEP[case]
    line = error_of("sweep", *(o.replace("{tiny}", str(tiny_model)) for o in overrides))
    assert [part for part in expected if part not in line] == [], line
    assert not list(work.glob(".edgeopt/studies/*/trials")), "no trial started"
    assert not list(work.glob("mlflow.db")), "nothing was recorded"


TEXT: dict[str, tuple[str, bytes | None, list[str]]] = {
    "empty": ("t.txt", b"", ["t.txt: the text is empty"]),
    "blank": ("t.txt", b" \n\n", ["t.txt: the text is empty"]),
    "missing": ("t.txt", None, ["t.txt: the file does not exist"]),
    "undecodable": ("t.txt", b"\xff\xfe\x00", ["t.txt: the text cannot be read", "UTF-8"]),
    "of another format": ("t.csv", b"a,b", ["t.csv: the file must end in .txt or .jsonl, got .csv"]),
    "a line that is not an object": ("t.jsonl", b'{"text": "a"}\n7\n', ["t.jsonl:2: ", '"text"']),
    "a line without text": ("t.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', ["t.jsonl:3: ", '"text"']),
    "a truncated line": ("t.jsonl", b'{"text": "a', ["t.jsonl:1: ", '"text"']),
    "short": ("t.txt", b"hi\n", ["t.txt: the longest document must have at least 16 token ids, got "]),
}


@pytest.mark.parametrize("role", ["evaluation", "calibration"])
@pytest.mark.parametrize("case", TEXT)
def test_bad_text_is_rejected(case: str, role: str, error_of: ErrorOf, work: Path, tiny_model: Path) -> None:
    name, content, expected = TEXT[case]
    if content is not None:
        (work / name).write_bytes(content)
    line = error_of("run", "model=local", f"model.path={tiny_model}", f"text@{role}=file", f"{role}.path={name}")
    assert [part for part in expected if part not in line] == [], line
    assert not list(work.glob(".edgeopt/cache/engine")), "nothing was built"


def test_overlapping_texts_are_rejected(error_of: ErrorOf, work: Path) -> None:
    assert "also in the calibration text" in error_of("run", "text@calibration=reference_validation")
    for name, shared in (("a.jsonl", LONG), ("b.jsonl", f"  {LONG}\n")):
        (work / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in (name, shared)))
    texts = [f"{role}.path={name}" for role, name in (("calibration", "a.jsonl"), ("evaluation", "b.jsonl"))]
    line = error_of("run", "text@calibration=file", "text@evaluation=file", *texts)
    assert line.startswith("b.jsonl: document 1 ")
    assert "a.jsonl" in line


Damage = Callable[[Path], object]
WEIGHTS = "model.safetensors"


def remove(name: str) -> Damage:
    """Return a function that removes the file `name` of a folder."""
    return lambda folder: (folder / name).unlink()


def rewrite(name: str, content: bytes) -> Damage:
    """Return a function that replaces the content of the file `name` of a folder."""
    return lambda folder: (folder / name).write_bytes(content)


def truncate_weights(end: int) -> Damage:
    """Return a function that keeps the bytes before `end` of the weights in a folder."""
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:end])


CORRUPT_HEADER = (16).to_bytes(8, "little") + b"no json at all, but bytes"
BERT = b'{"architectures": ["BertForMaskedLM"], "vocab_size": 300}'
MODEL: dict[str, tuple[Damage, list[str]]] = {
    "truncated": (
        truncate_weights(-1000),
        ["model.safetensors: ", "corrupt or truncated", "according to the header"],
    ),
    "truncated header": (truncate_weights(20), ["model.safetensors: ", "the header is truncated"]),
    "corrupt header": (rewrite(WEIGHTS, CORRUPT_HEADER), ["model.safetensors: ", "not a safetensors header"]),
    "pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        ["got the pickle pytorch_model.bin", "safe_serialization"],
    ),
    "no weights": (remove(WEIGHTS), ["the folder has no *.safetensors"]),
    "no tokenizer": (remove("tokenizer.json"), ["no tokenizer.json"]),
    "invalid tokenizer": (rewrite("tokenizer.json", b"{}"), ["tokenizer.json: the tokenizer cannot be read"]),
    "wrong architecture": (rewrite("config.json", BERT), ["config.json: ", "'BertForMaskedLM'", "ForCausalLM"]),
    "no config": (remove("config.json"), ["the folder has no config.json"]),
    "config that is not JSON": (rewrite("config.json", b"{"), ["config.json: the file is not valid JSON"]),
    "missing folder": (shutil.rmtree, ["the folder does not exist"]),
}


@pytest.mark.parametrize("case", MODEL)
def test_bad_model_is_rejected(case: str, error_of: ErrorOf, work: Path, tiny_model: Path) -> None:
    damage, expected = MODEL[case]
    damage(shutil.copytree(tiny_model, work / "given"))
    line = error_of("run", "model=local", "model.path=given")
    assert [part for part in [*expected, "given"] if part not in line] == [], line
    assert not [p for p in work.glob(".edgeopt/cache/*/*") if p.parent.name in ("model", "engine", "scratch")]


def test_rank_above_smallest_matrix_side_is_rejected(error_of: ErrorOf, tiny_model: Path) -> None:
    line = error_of("run", "recipe=prune_lora", "model=local", f"model.path={tiny_model}", "step.lora.rank=64")
    assert line == "step.lora.rank: `rank` must be at most the smallest matrix side 32, got 64. Use at most 32"


def test_model_without_suitable_runtime_is_rejected(error_of: ErrorOf, realdata: Path, work: Path) -> None:
    if not (realdata / "stories260K").is_dir():
        pytest.skip("stories260K is not available")
    overrides = ("recipe=baseline", "+step@step.kv=kv_cache", "order=[kv]")
    line = error_of("run", *overrides, "model=local", f"model.path={realdata / 'stories260K'}")
    assert line.startswith("runtime: ")
    assert [
        part for part in ("multiple of 16", "got 8", "portable ONNX does not support keys") if part not in line
    ] == []
    assert not list(work.glob(".edgeopt/cache/engine"))
    assert not (work / "mlflow.db").exists()


def test_unreachable_hub_is_reported_within_seconds(error_of: ErrorOf) -> None:
    started = time.monotonic()
    line = error_of("run", "model=smollm2_135m")
    assert line.startswith("model.repo: cannot download HuggingFaceTB/SmolLM2-135M at revision ")
    assert "model=local model.path=FOLDER" in line
    assert time.monotonic() - started < 15


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of an MLflow store with the model `known`; its only version has the alias `champion`."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("known")
    client.create_model_version("known", source=folder.as_uri())
    client.set_registered_model_alias("known", "champion", "1")
    return uri


@pytest.mark.parametrize("command", ["audit", "releases"])
def test_unregistered_model_is_rejected(command: str, error_of: ErrorOf, registry: str) -> None:
    line = error_of(command, "unknown", "--tracking-uri", registry)
    assert line == "NAME: no model 'unknown' is registered. Promote a study: `edgeopt promote`"


@pytest.fixture
def tracked(registry: str) -> None:
    import mlflow

    mlflow.set_tracking_uri(registry)


@pytest.mark.usefixtures("tracked")
@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("models:/nope@champion", "nope"),
        ("models:/known@chmpion", "chmpion"),
        ("models:/known/7", "7"),
        ("models:/", "models:/"),
    ],
)
@pytest.mark.parametrize("command", [("bench", "--engine"), ("generate",), ("run", "model=registry")])
def test_unknown_registered_model_is_rejected(
    command: tuple[str, ...], uri: str, expected: str, error_of: ErrorOf
) -> None:
    arguments = (*command, f"model.uri='{uri}'") if command[0] == "run" else (*command, uri)
    assert expected in error_of(*arguments)


@pytest.fixture
def engine(work: Path) -> Path:
    return samples.engine(work / "engine").directory


def change_file(folder: Path) -> None:
    content = bytearray((folder / "table.npy").read_bytes())
    content[-1] ^= 1
    (folder / "table.npy").write_bytes(content)


def lengthen_file(folder: Path) -> None:
    with (folder / "table.npy").open("ab") as file:
        file.write(b"x")


def change_manifest(folder: Path) -> None:
    manifest = folder / "edgeopt.json"
    manifest.write_text(manifest.read_text().replace('"context_length": 64', '"context_length": 65'))


def replace_by_checkpoint(folder: Path) -> None:
    spec = Checkpoint.read(folder).spec
    Checkpoint.seal(folder, format="checkpoint-1", spec=spec, made_by={"source": "x"})


ENGINE: dict[str, tuple[Damage, str]] = {
    "changed file": (change_file, "table.npy: the file was modified"),
    "longer file": (lengthen_file, "table.npy: the file was modified"),
    "missing file": (remove("table.npy"), "'table.npy' is missing"),
    "changed manifest": (change_manifest, "the manifest was modified"),
    "broken manifest": (rewrite("edgeopt.json", b"{}"), "the manifest cannot be read"),
    "no manifest": (remove("edgeopt.json"), "the folder has no manifest"),
    "checkpoint": (replace_by_checkpoint, "the folder must contain an engine, got a checkpoint"),
    "missing folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("command", [("bench", "--engine"), ("generate",)])
@pytest.mark.parametrize("case", ENGINE)
def test_invalid_engine_folder_is_rejected(
    case: str, command: tuple[str, ...], error_of: ErrorOf, engine: Path
) -> None:
    damage, expected = ENGINE[case]
    damage(engine)
    line = error_of(*command, "engine")
    assert expected in line
    assert line.startswith("engine")


@pytest.mark.parametrize("option", [("--max-new-tokens", "0"), ("--prompt", "x " * 99), ("--adapter", "x")])
def test_generate_rejects_invalid_options(option: tuple[str, str], error_of: ErrorOf, engine: Path) -> None:
    assert error_of("generate", str(engine), *option).startswith(f"{option[0]}: ")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("run", "file/state/cache: the cache folder cannot be written"),
        ("sweep", "file/state/studies.db: the folder of studies cannot be created"),
    ],
)
def test_unwritable_state_folder_is_rejected(
    command: str, expected: str, error_of: ErrorOf, work: Path, tiny_model: Path
) -> None:
    (work / "file").write_text("content")
    line = error_of(command, "state=file/state", "model=local", f"model.path={tiny_model}", code=1)
    assert expected in line
    assert "to a writable folder" in line
    assert (work / "file").read_text() == "content"


@pytest.mark.parametrize(
    "command",
    [
        ("run", "recipe=int4", "model=local", "model.path={tiny}"),
        ("generate", "models:/known@champion"),
        ("run", "model=registry", "model.uri='models:/known@champion'"),
    ],
)
def test_unreachable_server_is_reported_within_seconds(
    command: tuple[str, ...], error_of: ErrorOf, tiny_model: Path, tracked: None
) -> None:
    import mlflow

    mlflow.set_tracking_uri("http://127.0.0.1:9")
    started = time.monotonic()
    line = error_of(*(part.replace("{tiny}", str(tiny_model)) for part in command), code=1)
    assert "127.0.0.1:9: " in line
    assert "not answer" in line or "not respond" in line
    assert "MLFLOW_TRACKING_URI" in line
    assert time.monotonic() - started < 15


@pytest.fixture
def study(work: Path, registry: str) -> str:
    """Return the name of a study without trials."""
    request = assemble.Request(name="reference", overrides=(f"tracking.tracking_uri='{registry}'",))
    opened = OpenStudy.of(request, request.compose())
    opened.open()
    return opened.name


@pytest.mark.parametrize("command", ["front", "promote"])
def test_missing_study_is_reported(command: str, error_of: ErrorOf) -> None:
    assert "there is no study. Run edgeopt sweep first" in error_of(command)
    assert "there is no study" in error_of(command, "reference", "--state", "elsewhere")


@pytest.mark.parametrize("command", ["front", "promote"])
def test_unknown_study_error_lists_studies(command: str, error_of: ErrorOf, study: str) -> None:
    line = error_of(command, "nope")
    assert "there is no study 'nope'" in line
    assert study in line


def test_unknown_policy_error_lists_policies(error_of: ErrorOf, study: str) -> None:
    line = error_of("promote", study, "--policy", "nope")
    assert "nope.yaml" in line
    assert "default.yaml" in line


def test_study_without_feasible_trial_promotes_nothing(error_of: ErrorOf, study: str) -> None:
    assert "nothing was promoted" in error_of("promote", study, code=3)


@pytest.fixture
def user_configs(work: Path) -> Path:
    """Return a user's config folder in which every file has one error."""
    for name, content in {
        "step/narrow.yaml": "_target_: edgeopt.compress.pruning.prune_width.PruneWidth\nratoi: 0.2\n",
        "step/syntax.yaml": "a: [1\nb: 2\n",
        "step/evil.yaml": "_target_: os.system\ncommand: touch pwned\n",
        "step/list.yaml": "- 1\n",
        "recipe/narrow.yaml": "# @package _global_\ndefaults:\n  - /step@step.prune: narrow\norder: [prune]\n",
        "recipe/absent.yaml": "# @package _global_\ndefaults:\n  - /step@step.prune: narow\norder: [prune]\n",
        "target/capped.yaml": "_target_: edgeopt.core.target.Target\nname: capped\nmemory_cap: 3 ms\n",
        "cached.yaml": "defaults: [config, _self_]\ncache:\n  limit: 3 ms\n",
        "target/typo.yaml": "# @package _global_\nlimit:\n  size:\n    engine_mib: 3 GiB\n",
    }.items():
        (work / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "own" / name).write_text(content)
    return work / "own"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["recipe=narrow"], ["step.prune.ratoi: ", "Did you mean ratio?", "own/step/narrow.yaml:2"]),
        (["recipe=absent"], ["own/recipe/absent.yaml: ", "'narow'", "Did you mean narrow?"]),
        (["+step@step.a=syntax"], ["own/step/syntax.yaml:2: invalid YAML"]),
        (["+step@step.a=evil", "order=[a]"], ["step.a: ", "'os.system'", "edgeopt.plugins"]),
        (["+step@step.a=list", "order=[a]"], ["step.a: `a` must be a mapping with the key `_target_`, got [1]"]),
        (["target=capped"], ["target.memory_cap: ", "3 ms", "own/target/capped.yaml:3"]),
        (["--config-name", "cached"], ["cache.limit: ", "3 ms", "own/cached.yaml:3"]),
        (["target=typo"], ["limit: ", "Did you mean limits?", "own/target/typo.yaml:2"]),
    ],
)
def test_error_in_user_file_names_the_file(
    overrides: list[str], expected: list[str], error_of: ErrorOf, user_configs: Path, work: Path
) -> None:
    line = error_of("predict", "--config-dir", "own", *overrides)
    assert [part for part in expected if part not in line] == [], line
    assert not (work / "pwned").exists()


def test_error_in_override_names_no_file(error_of: ErrorOf, user_configs: Path) -> None:
    content = "_target_: edgeopt.compress.pruning.prune_width.PruneWidth\nratio: 0.2\n"
    (user_configs / "step" / "wide.yaml").write_text(content)
    line = error_of("predict", "--config-dir", "own", "recipe=prune", "step.prune.ratio=7.0")
    assert line.startswith("step.prune.ratio: `ratio` must be between 0 and 1, got 7.0")
    assert "wide.yaml" not in line


def test_invalid_trial_values_are_recorded_as_failure() -> None:
    for params, expected in (({"step.quantize.bits": 4}, "step.quantize.bits"), ({"recipe": "int5"}, "'int5'")):
        result = trial_process.evaluate_trial(assemble.Request(), params, lambda _: None)
        assert result.failure is not None
        assert (result.failure.stage, result.failure.kind, result.feasible) == ("config", "ConfigError", False)
        assert expected in result.failure.message


def test_debug_option_shows_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "recipe=int5", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("edgeopt: recipe: ")


def test_internal_error_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "execute", broken)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "edgeopt: RuntimeError: two lines. Run again with --debug for the details\n"


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["run", "--nope"], ["front", "a", "b"], ["generate", "--max-new-tokens", "x"], ["bench"], []],
)
def test_usage_error_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edgeopt: ")
    assert line.endswith("--help")


def test_overrides_and_options_may_be_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "recipe=prune", "--cfg", "step.prune.ratio=0.3", "--json", "state=there"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["step"]["prune"]["ratio"], config["state"]) == (0.3, "there")


@pytest.mark.parametrize(
    "key", ["limits.memory.peak_rss_mib", "++limits.memory.peak_rss_mib", "limits.memory/peak_rss_mib"]
)
def test_limit_without_default_can_be_set(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("this_machine", "sbc_4gib"):
        assert main(["predict", f"target={target}", f"{key}=3 GiB", "--json"]) == 0
        (limit,) = [x for x in json.loads(capsys.readouterr().out)["limits"] if x["metric"].startswith("memory")]
        assert limit["limit"] == "at most 3072 MiB"


def test_added_key_may_begin_with_underscore() -> None:
    config = parse.compose(["+_bits=64", "recipe=int4", "step.quantize.block_size=${_bits}"])
    assert config["step"]["quantize"]["block_size"] == 64


def test_unknown_field_error_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"target\.treads: .*Did you mean threads\?"):
        parse.instantiate_group(
            {"target": {"_target_": "edgeopt.core.target.Target", "name": "a", "treads": 2}}, "target"
        )


def test_help_imports_no_heavy_library() -> None:
    code = f"""
import sys
from edgeopt.cli.main import main
for command in {COMMANDS!r}:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
    assert process.stdout.count("example: edgeopt ") == len(COMMANDS)


def test_front_table_fits_file_width(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = samples.invented_trials(3)
    params = {"recipe": "int4", "step.quantize.block_size": 32, "rounding": "rtn"}
    failed = replace(second, state="failed", failure="config: order: Add it: order=[prune,quantize]")
    front.show(samples.snapshot([replace(first, params=params), failed, third]).to_json())
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "int4" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["int4", "32", "rtn"]
    assert "order=[prune,quantize]" in out, "brackets are not parsed as markup"
    assert max(map(len, out.splitlines())) <= terminal.FILE_WIDTH
