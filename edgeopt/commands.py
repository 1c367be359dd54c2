"""What each command does: from parsed arguments to one JSON document, and the error that decides the exit code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgeopt import assembly, display
from edgeopt import config as configs
from edgeopt.assembly import Request
from edgeopt.config import Config
from edgeopt.errors import ConfigError, EdgeoptError, InfeasibleError, InputError
from edgeopt.part import construct
from edgeopt.result import TrialResult
from edgeopt.search.front import Objective, row
from edgeopt.search.study import Search, Study

Document = dict[str, Any]
SINGLE_RUNS = "single-runs"
"""The study that `edgeopt run` logs into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A command's result for stdout, and the error that ends it, if one does."""

    document: Document
    error: EdgeoptError | None = None


def run(args: argparse.Namespace) -> Outcome:
    request = _request(args)
    config = request.compose()
    if args.cfg:
        return Outcome(document={"config": config})
    from edgeopt.pipeline import evaluate

    assembly.quiet()
    made = assembly.checked(config, request.config_dir)
    recorder = configs.part(config, "tracking")
    recorder.connect()
    recorder.open_study(SINGLE_RUNS, config, {})
    number = max(recorder.runs(SINGLE_RUNS), default=-1) + 1
    recorder.begin(SINGLE_RUNS, number, {})
    try:
        with display.progress(str(made.recipe)) as progress:
            result = evaluate(made, assembly.store(config), progress)
    except KeyboardInterrupt:
        recorder.kill(SINGLE_RUNS, number, "interrupted by Ctrl-C")
        raise
    run_id = recorder.record(SINGLE_RUNS, number, {}, config, result)
    document = {**result.to_json(), "feasible": result.feasible, "run_id": run_id}
    return Outcome(document=document, error=_error_of(result))


def sweep(args: argparse.Namespace) -> Outcome:
    from edgeopt.search import loop
    from edgeopt.search.worker import Worker

    request = _request(args, name=args.config_name)
    config = request.compose()
    if args.cfg:
        return Outcome(document={"config": config})
    assembly.quiet()
    for params in _first_params(config):  # faults of the whole sweep show before it starts
        assembly.checked(request.compose(params), request.config_dir)
    study, recorder = _study(config, request.config_dir), configs.part(config, "tracking")
    policy = _policy(config.get("promote"), request.config_dir)
    name = study.search.study
    recorder.connect()
    recorder.open_study(name, config, {})
    (study.folder / "sweep.json").write_text(json.dumps({"config": config, "config_dir": _text(request.config_dir)}))

    log = _StudyLog(recorder=recorder, study=name, request=request)
    status = "FAILED"
    try:
        with display.sweep(study) as watcher:
            loop.run(
                loop.Sweep(
                    study=study,
                    worker=Worker(partial(assembly.evaluate_trial, request), timeout_s=study.search.trial_timeout_s),
                    log=log,
                    watcher=watcher,
                    blank=partial(assembly.blank, request),
                )
            )
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        document = _front(study, recorder)
        recorder.close_study(
            name, rows=document["trials"], objectives=document["objectives"], limits=document["limits"], status=status
        )
    document["mlflow"] = asdict(recorder.ui_hint(name))
    if not document["front"]:
        return Outcome(document=document, error=_nothing_feasible(document))
    if policy is not None:
        document["promotion"] = _promoted(document, policy, recorder, request.config_dir)
        document["champion"] = _champion(policy.model, recorder, name)
    return Outcome(document=document)


def front(args: argparse.Namespace) -> Outcome:
    study, recorder, config, config_dir = _existing(args.study, args.state)
    document = _front(study, recorder)
    policy = _policy(config.get("promote"), config_dir)
    if policy is not None:
        document["champion"] = _champion(policy.model, recorder, study.search.study)
    return Outcome(document=document)


def promote(args: argparse.Namespace) -> Outcome:
    study, recorder, _, config_dir = _existing(args.study, args.state)
    policy = _policy(args.policy, args.config_dir or config_dir)
    recorder.connect()
    document = _front(study, recorder)
    if not document["front"]:
        raise _nothing_feasible(document)
    return Outcome(document=_promoted(document, policy, recorder, args.config_dir or config_dir))


def estimate(args: argparse.Namespace) -> Outcome:
    from edgeopt import intake
    from edgeopt.pipeline import plan
    from edgeopt.search import estimate as estimates

    request = _request(args)
    config = request.compose()
    recipe = configs.recipe(config)
    folder = configs.part(config, "model").locate()
    spec = intake.spec_of(folder)
    steps = [(name, construct(step, f"step.{name}")) for name, step in recipe.steps]
    planned = plan(steps, configs.part(config, "runtime"), spec)
    target, bench = configs.part(config, "target"), configs.part(config, "measure")
    predicted = estimates.estimate(
        planned,
        context_length=min(target.context_length, spec.context_length),
        prompt_length=max(bench.prompt_lengths),
        tokenizer_bytes=(folder / "tokenizer.json").stat().st_size,
    )
    figures = {"size/engine_mib": predicted.disk_bytes / 2**20, "memory/peak_rss_mib": predicted.peak_bytes / 2**20}
    verdicts = [
        {
            "metric": limit.metric,
            "limit": str(limit),
            "predicted": figures[limit.metric],
            "fits": figures[limit.metric] <= limit.at_most,
        }
        for limit in configs.limits(config, assembly.known_metrics(request.config_dir))
        if limit.metric in figures and limit.at_most is not None
    ]
    document = {
        "recipe": str(recipe),
        "target": target.name,
        "method": "estimated by arithmetic, nothing was measured",
        **asdict(predicted),
        "disk_bytes": predicted.disk_bytes,
        "peak_bytes": predicted.peak_bytes,
        "limits": verdicts,
        "next_lever": estimates.lever(planned),
    }
    broken = [v for v in verdicts if not v["fits"]]
    error = (
        InfeasibleError(f"{broken[0]['metric']} is predicted above its limit", mend=document["next_lever"])
        if broken
        else None
    )
    return Outcome(document=document, error=error)


def profile(args: argparse.Namespace) -> Outcome:
    import platform

    from edgeopt.measure.inventory import inventory, target_yaml

    with display.progress("measuring this machine"):
        device = inventory(rates=True)
    name = args.name or platform.node().split(".")[0] or "this_machine"
    written = target_yaml(device, name=name, threads=0, context_length=512)
    if args.out is not None:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(written)
        except OSError as error:
            raise InputError(
                f"the file cannot be written ({error.strerror})", place=str(args.out), mend="Give another --out"
            ) from error
    return Outcome(document={"device": asdict(device), "name": name, "written": _text(args.out), "yaml": written})


def bench(args: argparse.Namespace) -> Outcome:
    import tempfile

    if not args.engine:
        raise ConfigError("no engine is given", place="--engine", mend="Give an engine folder or models:/NAME@ALIAS")
    request = _request(args)
    bound = assembly.bench(request.compose())
    engine, runtime = assembly.open_engine(_engine_folder(args.engine))
    with tempfile.TemporaryDirectory(prefix="edgeopt-bench-") as folder, display.progress("measuring") as progress:
        measurements = bound(engine, runtime, Path(folder), {}, progress)
    return Outcome(
        document={
            "engine": str(engine.directory),
            "digest": engine.digest,
            "device": asdict(bound.device),
            "measurements": [asdict(m) for m in measurements],
        }
    )


def generate(args: argparse.Namespace) -> Outcome:
    from edgeopt import tokens

    if args.max_new_tokens < 1:
        raise ConfigError(
            f"{args.max_new_tokens} tokens cannot be generated", place="--max-new-tokens", mend="Give 1 or more"
        )
    assembly.quiet()
    folder = _engine_folder(args.engine) if args.engine else _bundled_engine()
    engine, runtime = assembly.open_engine(folder)
    tokenizer = tokens.load(engine.directory)
    prompt = tokens.prefix(engine.directory) + tokenizer.encode(args.prompt, add_special_tokens=False).ids
    room = engine.spec.context_length - len(prompt)
    if room < 1:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and the context holds {engine.spec.context_length}",
            place="--prompt",
            mend="Give a shorter prompt",
        )
    session = runtime.open(engine, threads=bound_threads())
    new = list(session.generate(prompt, min(args.max_new_tokens, room)))
    session.close()
    return Outcome(document={"prompt": args.prompt, "completion": tokenizer.decode(new), "tokens": len(new)})


def doctor(args: argparse.Namespace) -> Outcome:
    from edgeopt.diagnosis import diagnose

    return Outcome(document={"checks": [asdict(check) for check in diagnose()]})


def bound_threads() -> int:
    return assembly.this_machine().cores


@dataclass(frozen=True, slots=True, kw_only=True)
class _StudyLog:
    """The recorder bound to one study."""

    recorder: Any
    study: str
    request: Request

    def begin(self, number: int, params: Mapping[str, Any]) -> None:
        self.recorder.begin(self.study, number, params)

    def record(self, number: int, params: Mapping[str, Any], result: TrialResult) -> None:
        try:
            config = self.request.compose(dict(params))
        except ConfigError:
            config = self.request.compose()  # the trial's own values do not compose: that is its recorded failure
        self.recorder.record(self.study, number, params, config, result)

    def kill(self, number: int, why: str) -> None:
        self.recorder.kill(self.study, number, why)

    def open_trials(self) -> list[int]:
        return list(self.recorder.open_runs(self.study))


def _request(args: argparse.Namespace, name: str = "config") -> Request:
    for item in args.overrides:
        if "=" not in item and not item.startswith("~"):
            raise ConfigError(f"{item!r} is no override", place="arguments", mend="Give key=value")
    return Request(name=name, overrides=tuple(args.overrides), config_dir=args.config_dir)


def _study(config: Config, config_dir: Path | None) -> Study:
    search = configs.part(config, "search")
    if not isinstance(search, Search):
        raise ConfigError("it is no search", place="search._target_", mend="Name edgeopt.search.study.Search")
    known = assembly.known_metrics(config_dir)
    return Study(
        folder=Path(config["state"]) / "studies" / search.study,
        search=search,
        objectives=tuple(Objective.parse(metric, direction, known) for metric, direction in search.objectives.items()),
        limits=configs.limits(config, known),
    )


def _first_params(config: Config) -> list[dict[str, Any]]:
    search = configs.part(config, "search")
    return [dict(params) for params in search.enqueue] or [{}]


def _existing(name: str | None, state: Path) -> tuple[Study, Any, Config, Path | None]:
    """A study of this state folder, by name or the latest."""
    found = sorted((state / "studies").glob("*/sweep.json"), key=lambda p: p.stat().st_mtime)
    by_name = {path.parent.name: path for path in found}
    if not by_name:
        raise InputError("there is no study", place=str(state), mend="Run edgeopt sweep first, or give --state")
    name = name or found[-1].parent.name
    if name not in by_name:
        raise InputError(f"there is no study {name!r}", place=str(state), mend=f"Choose one of: {', '.join(by_name)}")
    saved = json.loads(by_name[name].read_text())
    config_dir = Path(saved["config_dir"]) if saved["config_dir"] else None
    saved["config"]["state"] = str(state)
    return _study(saved["config"], config_dir), configs.part(saved["config"], "tracking"), saved["config"], config_dir


def _front(study: Study, recorder: Any) -> Document:
    """The document of `edgeopt front`."""
    ranks, runs = study.ranks(), recorder.runs(study.search.study)
    known = assembly.known_metrics(None)
    rows = [
        row(e.number, e.state, e.params, e.result, ranks.get(e.number), runs.get(e.number)) for e in study.entries()
    ]
    bounds = {v.metric: v.bound for e in study.entries() if e.result for v in e.result.verdicts if v.bound is not None}
    return {
        "study": study.search.study,
        "objectives": [
            {"metric": o.metric, "unit": known.get(o.metric, ""), "direction": o.direction} for o in study.objectives
        ],
        "limits": [
            {"metric": x.metric, "limit": str(x), "bound": bounds.get(x.metric, x.at_most), "unit": x.unit}
            for x in study.limits
        ],
        "trials": rows,
        "front": sorted(number for number, rank in ranks.items() if rank == 1),
        "champion": None,
    }


def _policy(name: str | None, config_dir: Path | None) -> Any:
    from edgeopt.release import policy

    return None if name is None else policy.load(name, [config_dir / "registry"] if config_dir else [])


def _promoted(document: Document, policy: Any, recorder: Any, config_dir: Path | None) -> Document:
    from edgeopt.release.promote import promote as release

    with display.progress("promoting") as progress:
        promotion = release(
            study=document["study"],
            rows=document["trials"],
            objectives=document["objectives"],
            limits=document["limits"],
            policy=policy,
            tracking_uri=recorder.uri,
            folders=[config_dir / "registry"] if config_dir else [],
            progress=progress,
        )
    found: Document = promotion.to_json()
    return found


def _champion(model: str, recorder: Any, study: str) -> Document | None:
    from edgeopt.release import registry

    found: Document | None = registry.champion(model, recorder.uri, study=study)
    return found


def _engine_folder(given: str) -> Path:
    if given.startswith("models:/"):
        from edgeopt.release import registry
        from edgeopt.tracking import server

        server.probe(server.resolve(None))  # MLflow's own client tries for minutes
        return registry.resolve(given)
    return Path(given)


def _bundled_engine() -> Path:
    """The reference model in PyTorch, made once a user."""
    from edgeopt.models.reference import ReferenceModel
    from edgeopt.pipeline import engine_of
    from edgeopt.runtimes.eager import Torch

    config = configs.compose()
    return engine_of(ReferenceModel(), Torch(), assembly.store(config), lambda _: None).directory


def _error_of(result: TrialResult) -> EdgeoptError | None:
    """How a single run ends: its failure, or the first limit that it does not keep."""
    if result.failure is not None:
        kind = {"ConfigError": ConfigError, "InputError": InputError}.get(result.failure.kind, EdgeoptError)
        return kind(result.failure.message)
    broken = [v for v in result.verdicts if not v.kept]
    if broken:
        return InfeasibleError(
            f"{len(broken)} of {len(result.verdicts)} limits are not kept: {broken[0].metric}: {broken[0].reason}",
            mend="Compress further, or set wider limits",
        )
    return None


def _nothing_feasible(document: Document) -> InfeasibleError:
    """Which limit most trials break, so that a person knows where to look."""
    broken: dict[str, int] = {}
    for trial in document["trials"]:
        for metric, excess in trial["excess"].items():
            if excess is None or excess > 0:
                broken[metric] = broken.get(metric, 0) + 1
    worst = max(broken, key=lambda m: broken[m], default=None)
    why = f": {broken[worst]} of {len(document['trials'])} break {worst}" if worst else ""
    return InfeasibleError(
        f"no trial keeps every limit{why}; nothing was promoted",
        place=f"study {document['study']}",
        mend="Search longer, add smaller recipes, or set wider limits",
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
