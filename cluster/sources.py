"""Which feature file a stage works on: the one given, or the one of the run that belongs to its images."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ktransfer.artifacts.choosing import features_in
from ktransfer.artifacts.features import open_features
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.plan import Plan
from ktransfer.run import input_hash, read_record

from . import extraction
from .config import ClusterConfig
from .extraction import ExtractPlan

# What comparable features have in common
SAME = ("teacher", "arch", "weights", "layer", "token", "pool", "size", "l2", "dtype", "precision")


def features_path(run: Path, config: ClusterConfig) -> Path | None:
    """The feature file that is given, or that of the images in the run; None where it is still to be made.

    Raises:
        UsageError: the run's features were made with a teacher that was trained again since.
    """
    if config.features:
        return Path(config.features)
    spec = config.data or pretext_data(run)
    path = features_in(run, open_dataset(spec).fingerprint if spec else None, "cluster")
    if path is None:
        return None
    made = read_record(run, "features", path.stem)
    teacher = run / "pretext" / "model.safetensors"
    own = made is not None and not made["config"]["teacher"] and teacher.is_file()
    if own and open_features(path).attributes["teacher"] != input_hash(teacher):
        raise UsageError(
            f"{path}: was made with an older teacher; make it again: ktransfer --run {run} extract --overwrite"
        )
    return path


def outdated(run: Path, data: str | None) -> bool:
    """Whether the run's features of these images come from an older teacher than its own."""
    teacher = read_record(run, "pretext", "pretext")
    made = read_record(run, "features", open_dataset(data).name) if data and teacher else None
    if not made or not teacher or made["config"]["teacher"]:
        return False
    weights = teacher["outputs"].get("model.safetensors", {})  # none while it is unfinished
    return bool(made["inputs"]["teacher"] != weights.get("sha256"))


def pretext_data(run: Path) -> str | None:
    """The images that the teacher of the run learned from."""
    record = read_record(run, "pretext", "pretext")
    return record["config"]["data"] if record else None


def extraction_alike(run: Path, spec: str, clustered: Path, before: Sequence[Plan]) -> ExtractPlan:
    """The extraction of the images that `spec` names, in the way in which the clustered features were made.

    Args:
        before: the plans of the line so far; one of them may make the clustered features.

    Raises:
        UsageError: how the clustered features were made is not known.
    """
    coming = {plan.file: plan for plan in before if isinstance(plan, ExtractPlan)}
    record = read_record(run, "features", clustered.stem) if clustered.parent == run / "features" else None
    if clustered in coming:
        how = asdict(coming[clustered].config)
    elif record:
        how = record["config"]
    else:
        raise UsageError(
            f"assign --data {spec}: {clustered} was not extracted in this run, so the way it was made is not "
            "known; extract these images in the same way and give the file with --features"
        )
    if how.get("elsewhere"):
        raise UsageError(
            f"assign --data {spec}: {clustered} was made elsewhere; make the features of these images there "
            "too, and give them with --features and --keys"
        )
    data = open_dataset(spec)
    there, made = coming.get(run / "features" / f"{data.name}.h5"), read_record(run, "features", data.name)
    held = there.images.fingerprint if there else made and made["inputs"]["data"]
    # Many data sets are called "train".
    name = f"{data.name}-{data.fingerprint[:8]}" if held and held != data.fingerprint else None
    return extraction.check(run, {"data": spec, "name": name, **{key: how.get(key) for key in SAME}}, before, data)


def data_of(run: Path, path: Path) -> str | None:
    """The images of a feature file, None where it was not made in this run."""
    record = read_record(run, "features", path.stem) if path.parent == run / "features" else None
    return record["config"]["data"] if record else None
