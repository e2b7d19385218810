"""The eval stage: networks and labelled pictures in, a table of what came across out."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ktransfer import files, networks
from ktransfer.config import build, result_settings
from ktransfer.dataset import Dataset, open_parts
from ktransfer.errors import UsageError
from ktransfer.networks import Network
from ktransfer.pictures import typical_short_side
from ktransfer.progress import say
from ktransfer.run import begin, done_record, input_hash, need_disk, read_record
from ktransfer.training import loop

from .config import EvalConfig
from .linear import PROTOCOL, Arm, choose_layers, judge, map_bytes, rates, resized
from .table import to_csv, to_markdown

RANDOM = "random"
FINAL = (("retrain", "retrain"), ("pretext", "pretext"))
PRETEXT = ("jigsawpp", "jigsaw", "rotation", "context")  # tasks whose networks learned on pieces of pictures


def evaluate(run: str | Path, **options: Any) -> Path:
    """Judge the run's final network, the same with random weights, and those of other runs, by linear probes.

    Args:
        run: the run folder; `run/eval/linear.json`, `.csv` and `.md` are written.
        options: the fields of `EvalConfig`.

    Returns:
        The path of `linear.json`.

    Raises:
        UsageError, StageError: one line each.
    """
    run = Path(run)
    config, parts = check(run, options)
    arms = _arms(run, config)
    device = loop.choose_device(config)
    inputs = {part: data.fingerprint for part, data in zip(("train", "test"), parts, strict=True)}
    inputs |= {f"network {arm.name}": input_hash(arm.weights) for arm in arms if arm.weights}
    names = ["linear.json", "linear.csv", "linear.md"]
    with begin(run, "eval", "linear", config, inputs, [*names, "work"], config.overwrite, str(device)) as step:
        report = step.folder / "linear.json"
        if step.done:
            print(to_markdown(files.read_json(report)))
            return report
        result: dict[str, Any] = {
            "schema": 1,
            "protocol": PROTOCOL,
            "data": {"train": len(parts[0]), "test": len(parts[1]), "classes": len(parts[0].classes)},
            "chance": 1 / len(parts[0].classes),
            "settings": result_settings(config),
            "arms": {},
        }
        broken: dict[str, None] = {}  # in order, each once
        for arm in arms:
            work = step.folder / "work" / arm.name
            kept = work.with_name(f"{arm.name}.json")
            if not kept.is_file():  # judged before an interruption
                files.write_json(kept, judge(arm, parts, config, work, device))
            judged = files.read_json(kept)
            broken |= dict.fromkeys(judged.pop("broken", []))
            result["arms"][arm.name] = judged
        files.write_json(report, result)
        files.write_text(step.folder / "linear.csv", to_csv(result))
        files.write_text(step.folder / "linear.md", to_markdown(result))
        step.finish([step.folder / name for name in names], broken=list(broken))
        files.remove(step.folder / "work")
        print(to_markdown(result))
        say(f"eval: done; {len(broken)} broken pictures; {report}")
        return report


def check(
    run: Path, options: dict[str, Any], pending: Mapping[str, Any] | None = None
) -> tuple[EvalConfig, tuple[Dataset, Dataset]]:
    """Everything that can be found wrong before the work; the settings with pictures, size and stride resolved.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(EvalConfig, options, "eval")
    rates(config)
    loop.choose_device(config)
    made = read_record(run, "pretext", "pretext") or read_record(run, "retrain", "retrain")
    spec = config.labelled or (made and made["config"]["data"])
    if not spec:
        raise UsageError("eval: no labelled pictures given; name a root with train/ and val/ with --labelled")
    parts = open_parts(spec)
    config = replace(config, labelled=spec)
    coming = _coming(run, pending or {})
    network = coming or networks.describe(_final(run))
    size, stride = network.size, network.stride
    if network.task in PRETEXT:
        size, stride = min(224, typical_short_side(parts[0]) * 7 // 8 // 8 * 8), 4
    config = replace(config, size=config.size or size, stride=config.stride or stride)
    for arm in _arms(run, config, coming):
        if arm.weights:
            layers = choose_layers(networks.build(arm.network, 0, "check"), arm.network, config.layers)
            needed = map_bytes(layers, parts, config)
            if needed <= config.cache * 1e9:
                need_disk(run, needed, "eval")
    return config, parts


def _final(run: Path) -> Path:
    """The last network that a run made."""
    for stage, name in FINAL:
        if read_record(run, stage, name):
            done_record(run, stage, name, stage)
            return run / stage / "model.safetensors"
    raise UsageError(f"--run {run}: holds no finished network; make one first: ktransfer --run {run} pretext")


def _coming(run: Path, pending: Mapping[str, Any]) -> Network | None:
    """The final network that the stages before in the same line will make, if they do."""
    if "retrain" in pending:
        made_by = pending["retrain"]
        return Network(made_by.arch, made_by.width, made_by.stride, made_by.size, 2, "imagenet", "pseudo-labels")
    if "pretext" in pending and not read_record(run, "retrain", "retrain"):
        made_by = pending["pretext"]
        return Network(made_by.arch, made_by.width, 2, made_by.size, 0, "picture", made_by.task)
    return None


def _arms(run: Path, config: EvalConfig, coming: Network | None = None) -> list[Arm]:
    """Random weights, the run's own network (`coming` where it is still to be made), and those of the runs beside."""
    runs = [run] + [Path(part.strip()) for part in (config.beside or "").split(",") if part.strip()]
    found: list[Arm] = []
    for place in runs:
        mine = coming if place == run else None
        weights = run / "to come" if mine else _final(place)
        network = resized(mine or networks.describe(weights), config.size, config.stride)
        name = place.resolve().name
        if name in (arm.name for arm in found):
            raise UsageError(f"--beside {place}: a second run named '{name}'; rename its folder")
        found.append(Arm(name, network, weights))
    if config.random:
        if RANDOM in (arm.name for arm in found):
            raise UsageError(f"eval: a run named '{RANDOM}' beside random weights; rename its folder, or --no-random")
        fresh = replace(found[0].network, task="random")
        found.insert(0, Arm(RANDOM, fresh, None))
    return found
