"""The cluster and assign stages: features in, centroids and pseudo-labels out."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ktransfer import files
from ktransfer.config import build
from ktransfer.dataset import open_dataset
from ktransfer.errors import UsageError
from ktransfer.features import Features, open_features
from ktransfer.labels import write_labels
from ktransfer.progress import say
from ktransfer.run import begin, done_record, input_hash, read_record

from .centroids import Centroids, read_centroids, write_centroids
from .config import AssignConfig, ClusterConfig
from .engine import Rows
from .engines import choose_engine
from .extraction import check as check_extract
from .extraction import extract
from .kmeans import assign_rows, check_features, kmeans, load_state, save_state
from .projection import Projection, fit_projection, project
from .quality import quality, summary


def cluster(run: str | Path, **options: Any) -> Path:
    """k-means on all features of the run; they are extracted first where they are missing (paper §3.2).

    Args:
        run: the run folder; the stage writes `run/clusters/clusters.h5`.
        options: the fields of `ClusterConfig`.

    Raises:
        UsageError, StageError: one line each.
    """
    run = Path(run)
    config = check_cluster(run, options)
    path = _features_path(run, config) or extract(run, data=config.data)
    features = open_features(path)
    inputs = {"features": input_hash(path)}
    config = replace(config, features=str(path), data=config.data or _data_of(run, path))
    with begin(run, "clusters", "cluster", config, inputs, ["clusters.h5", "work"], config.overwrite, "cpu") as step:
        file = step.folder / "clusters.h5"
        if step.done:
            return file
        work = step.folder / "work"
        findings = check_features(features, config.k)
        say(
            f"cluster: {findings.rows} rows of {findings.columns} numbers, {findings.distinct} distinct, "
            f"{findings.constant} columns constant"
        )
        projection = fit_projection(features, config.pca) if config.pca else None
        state = work / "kmeans.npz"
        found = kmeans(
            rows_of(features, projection, config.normalise),
            config.k,
            config.iterations,
            config.seed,
            on_iteration=partial(save_state, state),
            state=load_state(state) if state.is_file() else None,
            engine=choose_engine(config.engine),
            points_total=len(features.valid),
        )
        write_centroids(file, found, projection, config.normalise, features)
        sizes = np.sort(found.counts)
        step.finish(
            [file],
            result={
                "points": f"trained on {found.points_used} of {found.points_total}",
                "objective": found.objective,
                "sizes": {"min": int(sizes[0]), "median": float(np.median(sizes)), "max": int(sizes[-1])},
                "empties": found.empties,
                "splits": found.splits,
            },
        )
        files.remove(work)
        say(
            f"cluster: done; k = {config.k}, trained on {found.points_used} of {found.points_total} rows, "
            f"{len(found.objective)} iterations; sizes {sizes[0]} / {np.median(sizes):g} / {sizes[-1]} "
            f"(min / median / max), {sum(found.splits)} splits; {file}"
        )
        return file


def assign(run: str | Path, **options: Any) -> Path:
    """Pseudo-labels: the nearest centroid of every picture of the same or another data set (jigsawpp.md §4).

    Args:
        run: the run folder; the stage writes `labels.csv`, `labels.h5` and `labels.bin` below `run/clusters`.
        options: the fields of `AssignConfig`.

    Raises:
        UsageError, StageError: one line each.
    """
    run = Path(run)
    config = check_assign(run, options)
    made = done_record(run, "clusters", "cluster", "cluster")
    centroids_path = run / "clusters" / "clusters.h5"
    centroids = read_centroids(centroids_path)
    clustered = Path(made["config"]["features"])
    if not clustered.is_file():  # the run folder was moved
        clustered = run / "features" / clustered.name
    path = _labelled_features(run, config, clustered)
    features = open_features(path)
    _refuse_mismatch(features, path, centroids, centroids_path)
    spec = config.data or _data_of(run, path)
    inputs = {"features": input_hash(path), "centroids": input_hash(centroids_path)}
    config = replace(config, features=str(path), data=spec)
    names = ["labels.csv", "labels.h5", "labels.bin"]
    with begin(run, "clusters", "assign", config, inputs, names, config.overwrite, "cpu") as step:
        if step.done:
            return step.folder / names[0]
        labels, distances = assign_rows(
            rows_of(features, centroids.projection, centroids.normalise),
            centroids.centroids,
            choose_engine(config.engine),
        )
        everywhere = np.full(len(features.valid), -1, np.int32)
        everywhere[features.valid] = labels
        far = np.full(len(features.valid), np.nan, np.float32)
        far[features.valid] = distances
        k = len(centroids.centroids)
        fingerprint = str(features.attributes["fingerprint"])
        write_labels(step.folder, features.keys, everywhere, far, k, inputs["centroids"], fingerprint)
        result = quality(everywhere, features.targets, k)
        step.finish([step.folder / name for name in names], result=result)
        say(f"assign: done; {summary(result)}; {step.folder / names[0]}")
        return step.folder / names[0]


def check_cluster(run: Path, options: dict[str, Any], pending: Mapping[str, Any] | None = None) -> ClusterConfig:
    """Everything that can be found wrong before the work, k against the number of pictures first of all.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(ClusterConfig, options, "cluster")
    coming = {"pretext", "extract"} & set(pending or ())
    path = None if coming and not config.features else _features_path(run, config)
    if path:
        features = open_features(path)
        count = int(features.valid.sum())
        dim = features.rows.shape[1]
        if config.pca > min(dim, count - 1):
            raise UsageError(
                f"--pca {config.pca}: the features have {dim} numbers and {count} rows; give a smaller one"
            )
    elif pending:
        spec = config.data or _pretext_data(run)
        count = len(open_dataset(spec)) if spec else config.k
    else:
        count = len(check_extract(run, {"data": config.data})[1])
    if config.k > count:
        raise UsageError(f"--k {config.k}: more clusters than the {count} pictures; give a smaller --k")
    return config


def check_assign(run: Path, options: dict[str, Any], pending: Mapping[str, Any] | None = None) -> AssignConfig:
    """Everything that can be found wrong before the work.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(AssignConfig, options, "assign")
    if config.features and config.data:
        raise UsageError("assign: both --features and --data given; give the one that is to be labelled")
    if config.features:
        open_features(Path(config.features))
    if config.data:
        open_dataset(config.data)
    if "cluster" not in (pending or ()):
        done_record(run, "clusters", "cluster", "cluster")
    return config


def rows_of(features: Features, projection: Projection | None, normalise: bool) -> Rows:
    """The valid rows as k-means sees them: float32, after the PCA, of length 1; read by blocks, never copied whole."""
    places = np.flatnonzero(features.valid)

    def read(start: int, stop: int) -> np.ndarray:
        chosen = places[start:stop]
        whole = len(chosen) and chosen[-1] - chosen[0] + 1 == len(chosen)
        block = features.rows[chosen[0] : chosen[-1] + 1] if whole else features.rows[chosen]
        rows = np.asarray(block, np.float32)
        if projection is not None:
            rows = project(projection, rows)
        if normalise:
            rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return np.ascontiguousarray(rows, np.float32)

    dim = features.rows.shape[1] if projection is None else projection.components.shape[1]
    return Rows(len(places), dim, read)


def _features_path(run: Path, config: ClusterConfig) -> Path | None:
    """The feature file that is given, or that of the pictures in the run; None where it is still to be made.

    Raises:
        UsageError: the run's features come from a teacher that was trained anew since.
    """
    if config.features:
        return Path(config.features)
    found = {path: open_features(path) for path in sorted((run / "features").glob("*.h5"))}
    spec = config.data or _pretext_data(run)
    if spec:
        fingerprint = open_dataset(spec).fingerprint
        found = {
            path: features for path, features in found.items() if features.attributes["fingerprint"] == fingerprint
        }
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise UsageError(f"cluster: the run has several feature files; choose one with --features: {names}")
    for path, features in found.items():
        made = read_record(run, "features", path.stem)
        teacher = run / "pretext" / "model.safetensors"
        own = made is not None and not made["config"]["teacher"] and teacher.is_file()
        if own and features.attributes["teacher"] != input_hash(teacher):
            raise UsageError(
                f"{path}: comes from an older teacher; make it again: ktransfer --run {run} extract --overwrite"
            )
        return path
    return None


def _pretext_data(run: Path) -> str | None:
    record = read_record(run, "pretext", "pretext")
    return record["config"]["data"] if record else None


SAME = ("teacher", "layer", "pool", "size", "l2", "dtype", "precision")  # what comparable features have in common


def _labelled_features(run: Path, config: AssignConfig, clustered: Path) -> Path:
    if config.features:
        return Path(config.features)
    if not config.data:
        return clustered
    record = read_record(run, "features", clustered.stem) if clustered.parent == run / "features" else None
    if record is None:
        raise UsageError(
            f"assign --data {config.data}: {clustered} was not extracted in this run, so the way it was made is not "
            "known; extract these pictures alike and give the file with --features"
        )
    data = open_dataset(config.data)
    taken = read_record(run, "features", data.name)
    # Many data sets are called "train".
    name = None if not taken or taken["inputs"]["data"] == data.fingerprint else f"{data.name}-{data.fingerprint[:8]}"
    return extract(run, data=config.data, name=name, **{key: record["config"][key] for key in SAME})


def _data_of(run: Path, path: Path) -> str | None:
    record = read_record(run, "features", path.stem) if path.parent == run / "features" else None
    return record["config"]["data"] if record else None


def _refuse_mismatch(features: Features, path: Path, centroids: Centroids, file: Path) -> None:
    wrong = [
        f"{name} is '{features.attributes.get(name)}', not '{value}'"
        for name, value in centroids.source.items()
        if features.attributes.get(name) != value
    ]
    if wrong:
        raise UsageError(f"{path}: not made as the features behind {file}: {'; '.join(wrong)}; extract them alike")
