"""The eval stage: networks and labelled images in, tables of their accuracy out."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer import files, networks
from ktransfer.config import Settings, build, chosen, chosen_settings, in_words, read_by, result_settings, settings_of
from ktransfer.data.loader import typical_short_side
from ktransfer.errors import Reply, UsageError
from ktransfer.networks import Network
from ktransfer.plan import Plan, PlannedStep, latest
from ktransfer.progress import say
from ktransfer.run import begin, input_hash, read_record, versions
from ktransfer.training.device import choose_device

from . import finished, supervised
from .arms import SUPERVISED, Arm, coming_network, final_network, find_arms
from .comparison import compare
from .config import PROTOCOLS, EvalConfig, own_settings
from .protocols import protocol as protocols
from .published import published
from .seeds import merged
from .table import to_csv, to_markdown

PRETEXT = ("jigsawpp", "jigsaw", "rotation", "context")  # tasks whose networks learned on pieces of images
PATHS = ("labelled", "beside", "subset")
SCHEMA = 2


class Evaluation(NamedTuple):
    """One protocol as it will be run."""

    protocol: str
    config: EvalConfig
    splits: Any
    settings: Settings
    """Those of `config` that this protocol reads."""

    def module(self) -> protocols.Module:
        """What evaluates: the protocol's module, or that of detectors which are finished."""
        return protocols.load("trained_detectors" if self.as_they_are else self.protocol)

    @property
    def as_they_are(self) -> bool:
        """Whether detectors are evaluated that selftrain finished."""
        return self.protocol == "detect" and self.config.trunk == finished.TRUNK

    def fingerprints(self) -> dict[str, str]:
        """Of the labelled images, by part, and of the list of those whose labels are used."""
        found = {name: split.fingerprint for name, split in zip(("train", "test"), self.splits, strict=False)}
        if self.protocol == "lowshot" and self.config.subset:
            found["subset"] = files.sha256(Path(self.config.subset))
        return found


@dataclass(frozen=True, kw_only=True)
class EvalPlan(Plan):
    """What the stage will do: a step for each protocol."""

    evaluations: list[Evaluation]


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
    return {evaluating.protocol: _evaluate(plan.run, evaluating) for evaluating in plan.evaluations}


def _evaluate(run: Path, evaluating: Evaluation) -> Path:
    name, config, splits, settings = evaluating
    protocol = evaluating.module()
    device = choose_device(config)
    if config.supervised:
        supervised.train(run, config, device)
    arms = protocol.arms(run, config) if hasattr(protocol, "arms") else find_arms(run, config)
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
            print(_shown(files.read_json(report), evaluating))
            return report
        work = step.folder / f"work-{name}"
        result: dict[str, Any] = {
            "schema": SCHEMA,
            "protocol": f"{protocol.PROTOCOL} {config.preset}" if _other_preset(evaluating) else protocol.PROTOCOL,
            "title": protocol.TITLE,
            "measures": protocol.MEASURES,
            "data": {"train": len(splits[0]), "test": len(splits[1]), "classes": len(splits[0].classes)},
            "chance": _chance(splits),
            "command": _command(run, evaluating),
            "settings": result_settings(settings),
            "inputs": inputs,
            "versions": versions(),
            "arms": {},
        }
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
        print(_shown(result, evaluating))
        say(f"eval {name}: done; {len(broken)} broken images; {report}")
        return report


def _command(run: Path, evaluating: Evaluation) -> str:
    """The line that evaluates the same again: every setting that counts and is not the default, and the paths."""
    names = [name for name in PATHS if name in evaluating.settings.values] + list(result_settings(evaluating.settings))
    names += ["supervised", "supervised_epochs", "size"] if evaluating.config.supervised else []
    own = {name: getattr(evaluating.config, name) for name in dict.fromkeys(names)}
    changed = {name: value for name, value in own.items() if value != getattr(EvalConfig, name)}
    return in_words(run.resolve().name, "eval", {"protocol": evaluating.protocol} | changed)


def _shown(result: dict[str, Any], evaluating: Evaluation) -> str:
    """The tables for the screen."""
    return to_markdown(result) + (f"\n{published(evaluating.protocol)}" if evaluating.config.published else "")


def _other_preset(evaluating: Evaluation) -> bool:
    """Whether it is the linear probe as others do it."""
    return evaluating.protocol == "linear" and evaluating.config.preset != "zhang"


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
    choose_device(given)
    names = chosen("--protocol", given.protocol, PROTOCOLS, "protocol")
    made = read_record(run, "pretext", "pretext") or read_record(run, "retrain", "retrain")
    learned = finished.labelled(run, before)  # by selftrain
    coming = coming_network(run, before)
    ready = "detect" in names and finished.wanted(run, given, before)
    read = {name: _read(name, ready and name == "detect", given) for name in names}
    _refuse_unread(given, read, ready)
    found: list[Evaluation] = []
    for name in names:
        as_it_is = ready and name == "detect"
        spec = given.labelled or (learned if as_it_is else made and made["config"]["data"])
        if not spec:
            raise UsageError("eval: no labelled images were given; name a folder with train/ and val/ by --labelled")
        splits = protocols.open_data(name, spec)
        if as_it_is:
            from .protocols import trained_detectors

            config = replace(given, protocol=name, labelled=spec, trunk=finished.TRUNK)
            trained_detectors.check(run, config, splits, learned, before)
            found.append(Evaluation(name, config, splits, chosen_settings(config, finished.READ)))
        else:
            network = coming or networks.describe(final_network(run))
            config = _resolved(replace(given, protocol=name, labelled=spec), network, splits)
            _check_protocol(name, run, config, splits, coming)
            found.append(Evaluation(name, config, splits, settings_of(config, name)))
    if given.supervised:
        supervised.check(run, coming or networks.describe(final_network(run)), [one.config for one in found])
    final = "retrain" if latest(before, "retrain") or read_record(run, "retrain", "retrain") else "pretext"
    return EvalPlan(
        stage="eval",
        run=run,
        steps=[
            PlannedStep(one.protocol, one.settings, one.fingerprints(), ("selftrain",) if one.as_they_are else (final,))
            for one in found
        ],
        overwrite=given.overwrite,
        stepwise=True,
        evaluations=found,
    )


def _resolved(config: EvalConfig, network: Network, splits: Any) -> EvalConfig:
    """The settings of one protocol, for the run's own network as it was trained."""
    size, stride = network.size, network.stride
    if network.task in PRETEXT:
        size, stride = min(224, typical_short_side(splits[0]) * 7 // 8 // 8 * 8), 4
    found_out = {"size": config.size or size, "stride": config.stride or stride}
    return replace(config, **(found_out | own_settings(config, config.protocol)))


def _check_protocol(name: str, run: Path, config: EvalConfig, splits: Any, coming: Network | None) -> None:
    """What the protocol itself finds wrong before the work."""
    arms = find_arms(run, config, coming)
    protocol = protocols.load(name)
    protocol.check([arm.network for arm in arms], splits, config, run)
    if hasattr(protocol, "check_arms"):
        protocol.check_arms(arms, config)


def _read(name: str, ready: bool, given: EvalConfig) -> set[str]:
    """The settings that a protocol reads, and the arm that is trained for it; `ready`: finished detectors."""
    if ready:
        allowed = {"random", *(field.name for field in fields(given) if field.metadata["execution"])}
        return {*finished.READ, *allowed}
    return read_by(given, (name, SUPERVISED) if given.supervised else (name,))


def _refuse_unread(given: EvalConfig, read: dict[str, set[str]], ready: bool) -> None:
    """Refuse options that nothing would read.

    Raises:
        UsageError: one line.
    """
    known = set[str]().union(*read.values())
    unread = [one for one in fields(given) if one.name not in known and getattr(given, one.name) != one.default]
    if unread:
        flags = ", ".join(f"--{one.name.replace('_', '-')}" for one in unread)
        names = ", ".join("detect of finished detectors" if ready and name == "detect" else name for name in read)
        whose = ", ".join(unread[0].metadata["of"]) or "others"
        raise UsageError(
            f"{flags}: not read by {names} (--{unread[0].name.replace('_', '-')}: by {whose}); leave it out"
        )
