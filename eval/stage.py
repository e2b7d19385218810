"""The eval stage: networks and labelled pictures in, tables of what came across out."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer import files, networks
from ktransfer.config import build, nearest, result_settings, settings_of
from ktransfer.errors import UsageError
from ktransfer.pictures import typical_short_side
from ktransfer.progress import say
from ktransfer.run import begin, input_hash, read_record, versions
from ktransfer.training import loop

from . import protocols
from .arms import Arm, coming_network, final_network, find_arms
from .config import DEFAULTS, PROTOCOLS, EvalConfig
from .seeds import merged
from .table import to_csv, to_markdown

PRETEXT = ("jigsawpp", "jigsaw", "rotation", "context")  # tasks whose networks learned on pieces of pictures
SCHEMA = 2


class Judging(NamedTuple):
    """One protocol as it will be run."""

    protocol: str
    config: EvalConfig
    parts: Any
    settings: Any
    """Those of `config` that this protocol reads."""

    def fingerprints(self) -> dict[str, str]:
        """Of the labelled pictures, by part."""
        return {name: part.fingerprint for name, part in zip(("train", "test"), self.parts, strict=False)}


def evaluate(run: str | Path, **options: Any) -> dict[str, Path]:
    """Judge the run's final network, the same with random weights, and those of other runs, by named protocols.

    Args:
        run: the run folder; `run/eval/PROTOCOL.json`, `.csv` and `.md` are written.
        options: the fields of `EvalConfig`.

    Returns:
        Protocol -> the path of its json file.

    Raises:
        UsageError, StageError: one line each.
    """
    run = Path(run)
    return {judging.protocol: _evaluate(run, judging) for judging in check(run, options)}


def _evaluate(run: Path, judging: Judging) -> Path:
    name, config, parts, settings = judging
    protocol = protocols.load(name)
    arms = find_arms(run, config)
    device = loop.choose_device(config)
    inputs = judging.fingerprints() | {f"network {arm.name}": input_hash(arm.weights) for arm in arms if arm.weights}
    names = [f"{name}.json", f"{name}.csv", f"{name}.md"]
    with begin(
        run, "eval", name, settings, inputs, [*names, name, f"work-{name}"], config.overwrite, str(device)
    ) as step:
        report = step.folder / names[0]
        if step.done:
            print(to_markdown(files.read_json(report)))
            return report
        work = step.folder / f"work-{name}"
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "protocol": protocol.PROTOCOL,
            "title": protocol.TITLE,
            "measures": protocol.MEASURES,
            "data": {"train": len(parts[0]), "test": len(parts[1]), "classes": len(parts[0].classes)},
            "chance": 1 / len(parts[0].classes),
            "settings": result_settings(settings),
            "versions": versions(),
            "arms": {},
        }
        broken: dict[str, None] = {}  # in order, each once
        drawn: list[str] = []
        for arm in arms:
            judged = [_judged(protocol, arm, judging, seed, work, device) for seed in range(config.seeds)]
            broken |= dict.fromkeys(line for one in judged for line in one.pop("broken", []))
            drawn += [file for one in judged for file in one.pop("files", [])]
            result["arms"][arm.name] = merged(judged)
        files.write_json(report, result)
        files.write_text(step.folder / names[1], to_csv(result))
        files.write_text(step.folder / names[2], to_markdown(result))
        drawn = [f"{name}/{file}" for file in dict.fromkeys(drawn)]
        step.finish([step.folder / file for file in [*names, *drawn]], broken=list(broken))
        files.remove(work)
        print(to_markdown(result))
        say(f"eval {name}: done; {len(broken)} broken pictures; {report}")
        return report


def _judged(
    protocol: protocols.Module, arm: Arm, judging: Judging, repetition: int, work: Path, device: Any
) -> dict[str, Any]:
    """What the protocol says of one network, from the file where it was judged before an interruption."""
    place = work / (arm.name if judging.config.seeds == 1 else f"{arm.name}-seed{repetition}")
    kept = place.with_name(f"{place.name}.json")
    if not kept.is_file():
        config = replace(judging.config, seed=judging.config.seed + repetition)
        files.write_json(kept, protocol.judge(arm, judging.parts, config, place, device))
    found: dict[str, Any] = files.read_json(kept)
    return found


def check(run: Path, options: dict[str, Any], pending: Mapping[str, Any] | None = None) -> list[Judging]:
    """Everything that can be found wrong before the work; for each protocol its settings resolved, and its pictures.

    Raises:
        UsageError: one line for what is wrong.
    """
    given = build(EvalConfig, options, "eval")
    loop.choose_device(given)
    names = list(dict.fromkeys(part.strip() for part in given.protocol.split(",")))
    for name in names:
        if name not in PROTOCOLS:
            raise UsageError(f"--protocol {name or given.protocol}: no such protocol; {nearest(name, PROTOCOLS)}")
    made = read_record(run, "pretext", "pretext") or read_record(run, "retrain", "retrain")
    spec = given.labelled or (made and made["config"]["data"])
    if not spec:
        raise UsageError("eval: no labelled pictures given; name a root with train/ and val/ with --labelled")
    coming = coming_network(run, pending or {})
    found: list[Judging] = []
    for name in names:
        parts = protocols.open_data(name, spec)
        network = coming or networks.describe(final_network(run))
        size, stride = network.size, network.stride
        if network.task in PRETEXT:
            size, stride = min(224, typical_short_side(parts[0]) * 7 // 8 // 8 * 8), 4
        own = {key: value for key, value in DEFAULTS.get(name, {}).items() if getattr(given, key) in (0, -1)}
        config = replace(
            given, protocol=name, labelled=spec, size=given.size or size, stride=given.stride or stride, **own
        )
        arms = find_arms(run, config, coming)
        protocols.load(name).check([arm.network for arm in arms], parts, config, run)
        found.append(Judging(name, config, parts, settings_of(config, name)))
    return found
