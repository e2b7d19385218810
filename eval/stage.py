"""The eval stage: networks and labelled images in, tables of their accuracy out."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ktransfer import files
from ktransfer.config import Settings, build, chosen, chosen_settings, in_words, read_by, result_settings, settings_of
from ktransfer.data.duplicates import tell_shared
from ktransfer.data.loader import typical_short_side
from ktransfer.detection.enough import need_boxes
from ktransfer.errors import Reply, UsageError
from ktransfer.networks import Network
from ktransfer.plan import Plan, PlannedStep
from ktransfer.progress import say, show
from ktransfer.run import begin, input_hash, versions
from ktransfer.training.device import choose_device

from . import finished, supervised
from .arms import SUPERVISED, Arm, Trained, find_arms, trained_networks
from .comparison import compare
from .config import LOCATED, PROTOCOLS, EvalConfig, own_settings
from .enough import labelled
from .protocols import protocol as protocols
from .published import published
from .seeds import merged
from .table import to_csv, to_markdown

PRETEXT = ("jigsawpp", "jigsaw", "rotation", "context")  # tasks whose networks learned on pieces of images
PATHS = ("labelled", "exif", "beside", "subset")
SCHEMA = 2


class Evaluation(NamedTuple):
    """One protocol as it will be run."""

    run: Path
    config: EvalConfig
    splits: Any
    settings: Settings
    """Those of `config` that this protocol reads."""
    trained: list[Trained]
    """The networks to evaluate, the run's own first; none where they are finished detectors."""
    device: torch.device

    def module(self) -> protocols.Module:
        """What evaluates: the protocol's module, or that of detectors which are finished."""
        return protocols.load(self.config.protocol if self.trained else "trained_detectors")

    def arms(self) -> list[Arm]:
        """What is evaluated, its weights by now made."""
        if not self.trained:
            from .protocols import trained_detectors

            return trained_detectors.arms(self.run, self.config)
        return find_arms([one.made() for one in self.trained], self.config)

    def reads(self) -> tuple[str, ...]:
        """The stage of the run whose outcome is evaluated."""
        return (self.trained[0].stage if self.trained else finished.STAGE,)

    def fingerprints(self) -> dict[str, str]:
        """Of the labelled images, by part, and of the list of those whose labels are used."""
        found = {name: split.fingerprint for name, split in zip(("train", "test"), self.splits, strict=False)}
        if self.config.protocol == "lowshot" and self.config.subset:
            found["subset"] = files.sha256(Path(self.config.subset))
        return found


@dataclass(frozen=True, kw_only=True)
class EvalPlan(Plan):
    """What the stage will do: a step for each protocol."""

    evaluations: list[Evaluation]
    supervised: supervised.Training | None


def evaluate(run: str | Path, **options: Any) -> dict[str, Path]:
    """Evaluate the run's final network, the same with random weights, and those of other runs, by named protocols.

    Args:
        run: the run folder; `run/eval/PROTOCOL.json`, `.csv` and `.md` are written.
        options: the fields of `EvalConfig`.

    Returns:
        Protocol -> the path of its json file.

    Raises:
        UsageError, StageError: one line each.
    """
    return carry_out(check(Path(run), options))


def carry_out(plan: EvalPlan) -> dict[str, Path]:
    """Evaluate by one protocol after the other."""
    if plan.supervised:
        supervised.train(plan.supervised)
    return {evaluating.config.protocol: _evaluate(evaluating) for evaluating in plan.evaluations}


def _evaluate(evaluating: Evaluation) -> Path:
    run, config, splits, settings, _, device = evaluating
    name, protocol = config.protocol, evaluating.module()
    arms = evaluating.arms()
    if hasattr(protocol, "check_arms"):  # weights that the line has made since it was planned
        protocol.check_arms(arms, config)
    inputs = evaluating.fingerprints() | {f"network {arm.name}": input_hash(arm.weights) for arm in arms if arm.weights}
    inputs |= protocol.inputs(arms, splits, config) if hasattr(protocol, "inputs") else {}
    names = [f"{name}.json", f"{name}.csv", f"{name}.md"]
    with begin(
        run, "eval", name, settings, inputs, [*names, name, f"work-{name}"], config.overwrite, str(device)
    ) as step:
        report = step.folder / names[0]
        if step.done:
            show(_shown(files.read_json(report), evaluating))
            return report
        work = step.folder / f"work-{name}"
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "protocol": f"{protocol.PROTOCOL} {config.preset}" if _other_preset(evaluating) else protocol.PROTOCOL,
            "title": protocol.TITLE,
            "measures": protocol.MEASURES,
            "data": {"train": len(splits[0]), "test": len(splits[1]), "classes": len(splits[0].classes)},
            "chance": _chance(splits),
            "command": _command(evaluating),
            "settings": result_settings(settings),
            "inputs": inputs,
            "versions": versions(),
            "arms": {},
        }
        ways = {arm.name: arm.network.normalise for arm in arms}
        result |= {"normalised": ways} if len(set(ways.values())) > 1 else {}
        for name_of in ("LOWER_IS_BETTER", "NEITHER_IS_BETTER", "RELATIVE", "NOTE"):
            if hasattr(protocol, name_of):
                result[name_of.lower()] = getattr(protocol, name_of)
        broken: dict[str, None] = {}  # in order, each once
        drawn: list[str] = []
        evaluated = [
            {arm.name: _evaluated(protocol, arm, evaluating, seed, work, device) for arm in arms}
            for seed in range(config.seeds)
        ]
        if hasattr(protocol, "relate"):
            for together in evaluated:
                protocol.relate(together, config)
        for arm in arms:
            repetitions = [together[arm.name] for together in evaluated]
            broken |= dict.fromkeys(line for one in repetitions for line in one.pop("broken", []))
            drawn += [file for one in repetitions for file in one.pop("files", [])]
            result["arms"][arm.name] = merged(repetitions)
        files.write_json(report, result)
        files.write_text(step.folder / names[1], to_csv(result))
        files.write_text(step.folder / names[2], to_markdown(result))
        drawn = [f"{name}/{file}" for file in dict.fromkeys(drawn)]
        step.finish([step.folder / file for file in [*names, *drawn]], broken=list(broken))
        files.remove(work)
        show(_shown(result, evaluating))
        say(f"eval {name}: done; {len(broken)} broken images; {report}")
        return report


def _command(evaluating: Evaluation) -> str:
    """The line that evaluates the same again: every setting that counts and is not the default, and the paths."""
    names = [name for name in PATHS if name in evaluating.settings.values] + list(result_settings(evaluating.settings))
    names += ["supervised", "supervised_epochs", "size"] if evaluating.config.supervised else []
    own = {name: getattr(evaluating.config, name) for name in dict.fromkeys(names)}
    changed = {name: value for name, value in own.items() if value != getattr(EvalConfig, name)}
    return in_words(evaluating.run.resolve().name, "eval", {"protocol": evaluating.config.protocol} | changed)


def _shown(result: dict[str, Any], evaluating: Evaluation) -> str:
    """The tables for the screen."""
    return to_markdown(result) + (f"\n{published(evaluating.config.protocol)}" if evaluating.config.published else "")


def _other_preset(evaluating: Evaluation) -> bool:
    """Whether it is the linear probe as others do it."""
    return evaluating.config.protocol == "linear" and evaluating.config.preset != "zhang"


def _chance(splits: Any) -> float:
    """What guessing reaches: one class of all; of several labels an image, the share of images that have one."""
    if (tags := getattr(splits[1], "tags", None)) is None:
        return 1 / len(splits[0].classes)
    return float((tags == 1).sum() / (tags >= 0).sum())


def _evaluated(
    protocol: protocols.Module, arm: Arm, evaluating: Evaluation, repetition: int, work: Path, device: Any
) -> dict[str, Any]:
    """What the protocol says of one network, from the file where it was evaluated before an interruption."""
    place = work / (arm.name if evaluating.config.seeds == 1 else f"{arm.name}-seed{repetition}")
    kept = place.with_name(f"{place.name}.json")
    if not kept.is_file():
        config = replace(evaluating.config, seed=evaluating.config.seed + repetition)
        files.write_json(kept, protocol.evaluate(arm, evaluating.splits, config, place, device))
    files.remove(place)  # not before: killed in between, the whole network would be evaluated again
    found: dict[str, Any] = files.read_json(kept)
    return found


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = ()) -> EvalPlan:
    """Everything that can be found wrong before the work; for each protocol its settings resolved, and its images.

    Raises:
        Reply: `--compare` was given; it holds the tables.
        UsageError: one line for what is wrong.
    """
    given = build(EvalConfig, options, "eval")
    if given.compare:
        raise Reply(compare([run, *(part.strip() for part in given.compare.split(","))], given.published))
    device = choose_device(given)
    names = chosen("--protocol", given.protocol, PROTOCOLS, "protocol")
    detectors = finished.wanted(run, given, before) if "detect" in names else None
    _refuse_unread(given, dict(_read(name, given, detectors is not None) for name in names))
    trained = [] if detectors and names == ["detect"] else trained_networks(run, given, before)
    found = [
        _of_detectors(run, given, detectors, device)
        if detectors and name == "detect"
        else _of_networks(run, replace(given, protocol=name), trained, device)
        for name in names
    ]
    training = supervised.check(trained[0], [one.config for one in found], device) if given.supervised else None
    return EvalPlan(
        stage="eval",
        run=run,
        steps=[PlannedStep(one.config.protocol, one.settings, one.fingerprints(), one.reads()) for one in found],
        overwrite=given.overwrite,
        stepwise=True,
        evaluations=found,
        supervised=training,
    )


def _of_detectors(run: Path, given: EvalConfig, detectors: finished.Finished, device: torch.device) -> Evaluation:
    """The evaluation of detectors as selftrain made them."""
    from .protocols import trained_detectors

    labelled, exif = given.labelled or detectors.labelled, given.exif or detectors.exif
    config = replace(given, protocol="detect", labelled=labelled, trunk=finished.TRUNK, exif=exif)
    splits = _opened(config)
    trained_detectors.check(run, config, splits, detectors)
    need_boxes(None, splits[1], config.canvas)
    return Evaluation(run, config, splits, chosen_settings(config, finished.READ), [], device)


def _of_networks(run: Path, config: EvalConfig, trained: list[Trained], device: torch.device) -> Evaluation:
    """The evaluation of networks by the protocol of `config`."""
    config = replace(config, labelled=config.labelled or trained[0].images)
    splits = _opened(config)
    config = _resolved(config, trained[0].network, splits)
    arms = find_arms(trained, config)
    protocol = protocols.load(config.protocol)
    protocol.check([arm.network for arm in arms], splits, config, run)
    getattr(protocol, "enough", labelled)(splits, config)
    if hasattr(protocol, "check_arms"):
        protocol.check_arms(arms, config)
    return Evaluation(run, config, splits, settings_of(config, config.protocol), trained, device)


def _opened(config: EvalConfig) -> Any:
    if not config.labelled:
        raise UsageError("eval: no labelled images were given; name a folder with train/ and val/ by --labelled")
    exif = config.exif if config.protocol in LOCATED else None
    splits = protocols.open_data(config.protocol, config.labelled, exif)
    tell_shared(config.labelled, *splits[:2])
    return splits


def _resolved(config: EvalConfig, network: Network, splits: Any) -> EvalConfig:
    """The settings of one protocol, for the run's own network as it was trained."""
    size, stride = network.size, network.stride
    if network.task in PRETEXT:
        size, stride = min(224, typical_short_side(splits[0]) * 7 // 8 // 8 * 8), 4
    found_out = {"size": config.size or size, "stride": config.stride or stride}
    return replace(config, **(found_out | own_settings(config, config.protocol)))


def _read(name: str, given: EvalConfig, finished_detectors: bool) -> tuple[str, set[str]]:
    """What is evaluated, in words, and the settings that it reads, with those of the arm that is trained for it."""
    if name == "detect" and finished_detectors:
        allowed = {"random", *(field.name for field in fields(given) if field.metadata["execution"])}
        return "detect of finished detectors", {*finished.READ, *allowed}
    return name, read_by(given, (name, SUPERVISED) if given.supervised else (name,))


def _refuse_unread(given: EvalConfig, read: dict[str, set[str]]) -> None:
    """Refuse options that nothing would read.

    Args:
        read: what is evaluated, in words -> the settings that it reads.

    Raises:
        UsageError: one line.
    """
    known = set[str]().union(*read.values())
    unread = [one for one in fields(given) if one.name not in known and getattr(given, one.name) != one.default]
    if unread:
        flags = ", ".join(f"--{one.name.replace('_', '-')}" for one in unread)
        whose = ", ".join(unread[0].metadata["of"]) or "others"
        raise UsageError(
            f"{flags}: not read by {', '.join(read)} (--{unread[0].name.replace('_', '-')}: by {whose}); leave it out"
        )
