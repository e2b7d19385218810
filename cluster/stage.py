"""The cluster and assign stages: features in, centroids and pseudo-labels out."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ktransfer import files
from ktransfer.artifacts.centroids import read_centroids
from ktransfer.artifacts.features import Features, open_features
from ktransfer.artifacts.labels import write_labels
from ktransfer.config import build, nearest
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.progress import say
from ktransfer.run import begin, done_record, input_hash

from .algorithms.balanced import assign_balanced
from .algorithms.initialisation import STARTS, sample_size, start_of
from .algorithms.lloyd import Clustering, assign_rows, kmeans, refuse_sizes
from .algorithms.minibatch import minibatch_kmeans
from .algorithms.restarts import best_of
from .algorithms.two_level import two_level
from .centroids import read_start, write_centroids
from .config import AssignConfig, ClusterConfig
from .distributed import open_rows, planned_rows
from .engines.choose import device_of, parts_engine
from .engines.engine import Engine, Rows, described
from .extraction import check as check_extract
from .extraction import extract
from .feature_check import check_features
from .foreign import adopt, check_keys, is_foreign, open_foreign, preview
from .projection import fit_projection
from .quality import quality, sparkline, summary
from .record import derived_seed, make_record, record_summary, survey, write_record
from .rows import plan_memory
from .sheet import images_of, save_sheet
from .sources import data_of, features_path, labelled_features, pretext_data, refuse_mismatch

BALANCED_BYTES = 144  # of a row, beyond a plain assignment
OUTPUTS = ("clusters.h5", "quality.json", "clusters.png", "work")


def cluster(run: str | Path, **options: Any) -> Path:
    """k-means on all features of the run; they are extracted first where they are missing (paper §3.2).

    Args:
        run: the run folder; the stage writes `clusters.h5`, `quality.json` and, where it has the images,
            `clusters.png` below `run/clusters`.
        options: the fields of `ClusterConfig`.

    Raises:
        UsageError, StageError: one line each.
    """
    run = Path(run)
    config = check_cluster(run, options)
    if config.features and is_foreign(config.features):
        adopted = adopt(run, config.features, config.keys, config.data, config.overwrite, "cluster")
        config = replace(config, features=str(adopted))
    path = features_path(run, config) or extract(run, data=config.data)
    features = open_features(path)
    inputs = {"features": input_hash(path)}
    start = config.start
    if start not in STARTS:
        inputs["start"] = input_hash(Path(start))
        start = f"file of SHA-256 {inputs['start']}"
    config = replace(config, features=str(path), data=config.data or data_of(run, path))
    device = device_of(config.engine)
    with begin(run, "clusters", "cluster", config, inputs, OUTPUTS, config.overwrite, device) as step:
        file = step.folder / "clusters.h5"
        work = step.folder / "work"
        if step.done:
            files.remove(work)  # left by a kill after the last file
            return file
        findings = check_features(features, config.k)
        say(
            f"cluster: {findings.rows} rows of {findings.columns} numbers, {findings.distinct} distinct, "
            f"{findings.constant} columns constant"
        )
        given = _given_start(config, config.pca or findings.columns)
        projection = fit_projection(features, config.pca, config.whiten) if config.pca else None
        more = _extra_bytes(config, findings.rows, config.pca or findings.columns, findings.columns)
        rows, engine = open_rows(
            features, projection, config.normalise, config.k, config.engine, config.memory, "cluster", *more
        )
        clustered = _clusterer(config, rows, engine, given, len(features.valid), work)
        found = replace(clustered(seed=config.seed), start=start)
        write_centroids(file, found, projection, config.normalise, features)
        second = clustered(seed=derived_seed(config.seed), name="stability") if config.stability else None
        evaluated = _evaluate(step.folder, config, features, rows, found, second)
        sizes = np.sort(found.counts)
        step.finish(
            [file, *evaluated],
            result={
                "points": f"trained on {found.points_used} of {found.points_total}",
                "objective": found.objective,
                "sizes": {"min": int(sizes[0]), "median": float(np.median(sizes)), "max": int(sizes[-1])},
                "empties": found.empties,
                "splits": found.splits,
                "moved": found.moved,
                "dissolved": found.dissolved,
                "start": found.start,
                "attempts": found.attempts,
                "attempt": found.attempt,
                "engine": f"{found.engine}, {found.version}",
                "bytes_read": found.bytes_read,
                "seconds": [round(seconds, 3) for seconds in found.seconds],
            },
        )
        files.remove(work)
        say(
            f"cluster: done; k = {len(sizes)}, trained on {found.points_used} of {found.points_total} rows, "
            f"{len(found.objective)} iterations; sizes {sizes[0]} / {np.median(sizes):g} / {sizes[-1]} "
            f"(min / median / max), {sum(found.splits)} splits; {file}"
        )
        return file


def assign(run: str | Path, **options: Any) -> Path:
    """Pseudo-labels: the nearest centroid of every image of the same or another data set (docs/papers.md).

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
    if config.features and is_foreign(config.features):
        path = adopt(run, config.features, config.keys, config.data, config.overwrite, "assign")
    else:
        path = labelled_features(run, config, clustered)
    features = open_features(path)
    refuse_mismatch(features, path, centroids, centroids_path)
    spec = config.data or data_of(run, path)
    inputs = {"features": input_hash(path), "centroids": input_hash(centroids_path)}
    config = replace(config, features=str(path), data=spec)
    names = ["labels.csv", "labels.h5", "labels.bin"]
    device = "cpu" if config.balanced else device_of(config.engine)
    with begin(run, "clusters", "assign", config, inputs, names, config.overwrite, device) as step:
        if step.done:
            return step.folder / names[0]
        k = len(centroids.centroids)
        prepared = features, centroids.projection, centroids.normalise, k
        more: dict[str, Any] = {}
        if config.balanced:
            extra = BALANCED_BYTES * int(features.valid.sum())
            rows, _ = planned_rows(*prepared, config.memory, "assign", extra)
            even = assign_balanced(rows, centroids.centroids)
            labels, distances, by = even.labels, even.distances, f"balanced, products by numpy {np.__version__}"
            more = {"cost": even.cost, "least cost possible": even.bound}
            say(f"assign: equal sizes; cost {even.cost:.8g}, the least possible is at least {even.bound:.8g}")
        else:
            rows, engine = open_rows(*prepared, config.engine, config.memory, "assign")
            labels, distances = assign_rows(rows, centroids.centroids, engine)
            by = described(engine)
        everywhere = np.full(len(features.valid), -1, np.int32)
        everywhere[features.valid] = labels
        far = np.full(len(features.valid), np.nan, np.float32)
        far[features.valid] = distances
        fingerprint = str(features.attributes.get("fingerprint"))
        write_labels(step.folder, features.keys, everywhere, far, k, inputs["centroids"], fingerprint)
        result = quality(everywhere, features.targets, k)
        step.finish([step.folder / name for name in names], result=result | more | {"engine": by})
        say(f"assign: done; {summary(result)}; {step.folder / names[0]}")
        return step.folder / names[0]


def check_cluster(run: Path, options: dict[str, Any], pending: Mapping[str, Any] | None = None) -> ClusterConfig:
    """Everything that can be found wrong before the work, k against the number of images first of all.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(ClusterConfig, options, "cluster")
    check_keys(config.features, config.keys)
    dim = config.pca or None
    if config.whiten and not config.pca:
        raise UsageError("--whiten: needs the principal components; give --pca too")
    if config.spherical and not config.normalise:
        raise UsageError("--spherical: needs rows of length 1; leave --no-normalise away")
    _refuse_foreign_settings(config)
    if 0 < config.start_sample < config.k:
        raise UsageError(f"--start-sample {config.start_sample}: fewer rows than the {config.k} clusters; give more")
    if config.start not in STARTS and (config.redo > 1 or config.stability):
        raise UsageError(f"--start {config.start}: --redo and --stability need starts that differ; leave them away")
    coming = {"pretext", "extract"} & set(pending or ())
    path = None if coming and not config.features else features_path(run, config)
    if path:
        features = preview(str(path), config.keys, config.data) if is_foreign(str(path)) else open_features(path)
        count = int(features.valid.sum())
        columns = features.rows.shape[1]
        dim = dim or columns
        if config.pca > columns:
            raise UsageError(f"--pca {config.pca}: the features have {columns} numbers; give a smaller one")
    elif pending:
        spec = config.data or pretext_data(run)
        count = len(open_dataset(spec)) if spec else config.k
    else:
        count = len(check_extract(run, {"data": config.data})[1])
    if config.k > count:
        raise UsageError(f"--k {config.k}: more clusters than the {count} images; give a smaller --k")
    if config.pca >= count:
        raise UsageError(f"--pca {config.pca}: must be below the number of images, {count}; give a smaller one")
    refuse_sizes(config.k, config.min_size, count)
    if path:
        dim = dim or columns
        plan_memory(features, config.k, dim, config.memory, *_extra_bytes(config, count, dim, columns))
    _given_start(config, dim)
    return config


def _clusterer(
    config: ClusterConfig, rows: Rows, engine: Engine, start: np.ndarray | None, total: int, work: Path
) -> Callable[..., Clustering]:
    """(seed, name) -> Clustering by the algorithm of the settings; it goes on where the files of NAME in `work` say."""
    common: dict[str, Any] = {"engine": engine, "points_total": total}
    if config.algorithm != "lloyd":
        common["parts"] = parts_engine(config.engine)
        what = "groups" if config.algorithm == "two-level" else "batches"
        say(f"k-means: {what} by {common['parts'].name}, passes over all rows by {engine.name}")
    if config.algorithm == "two-level":
        return partial(two_level, rows, config.k, config.iterations, work=work, refine=config.refine, **common)

    def begun(seed: int) -> np.ndarray:
        return start_of(config.start, rows, config.k, seed, config.start_sample, engine) if start is None else start

    if config.algorithm == "minibatch":
        once = partial(minibatch_kmeans, batch_rows=config.batch_rows, **common)
    else:
        once = partial(kmeans, min_size=config.min_size, spherical=config.spherical, **common)
    once = partial(once, rows, config.k, config.iterations)
    return partial(best_of, config.redo, rows, begun, once, work=work, spherical=config.spherical)


def _extra_bytes(config: ClusterConfig, count: int, dim: int, columns: int) -> tuple[int, int]:
    """What the start and the algorithm hold besides rows and centroids, and what the PCA needs before (plan_memory)."""
    sample = sample_size(count, dim, config.k, config.start_sample)
    extra = {"kmeans-parallel": 48 * count, "kmeans++": 5 * dim * sample}.get(config.start, 0)
    groups = 2**28 + 28 * count if config.algorithm == "two-level" else 0
    return extra + groups, 48 * columns**2 if config.pca else 0


def _refuse_foreign_settings(config: ClusterConfig) -> None:
    """UsageError where settings are given that the algorithm does not have."""
    foreign = {
        "lloyd": ("refine", "batch_rows"),
        "two-level": ("batch_rows", "start", "start_sample", "redo", "min_size", "spherical"),
        "minibatch": ("refine", "min_size", "spherical"),
    }
    for name in foreign[config.algorithm]:
        if getattr(config, name) != getattr(ClusterConfig, name):
            flag = name.replace("_", "-")
            raise UsageError(f"--algorithm {config.algorithm}: has no --{flag}; leave that away or take another one")


def check_assign(run: Path, options: dict[str, Any], pending: Mapping[str, Any] | None = None) -> AssignConfig:
    """Everything that can be found wrong before the work.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(AssignConfig, options, "assign")
    if config.balanced and config.engine != AssignConfig.engine:
        raise UsageError(
            f"assign --balanced: looks at all clusters of each row on the CPU, without an engine; "
            f"leave --engine {config.engine} away"
        )
    check_keys(config.features, config.keys)
    if config.features and is_foreign(config.features):
        open_foreign(config.features, config.keys, config.data)
    elif config.features and config.data:
        raise UsageError("assign: both --features and --data given; give the one that is to be labelled")
    elif config.features:
        open_features(Path(config.features))
    if config.data:
        open_dataset(config.data)
    if "cluster" not in (pending or ()):
        done_record(run, "clusters", "cluster", "cluster")
    return config


def _evaluate(
    folder: Path,
    config: ClusterConfig,
    features: Features,
    rows: Rows,
    found: Clustering,
    second: Clustering | None,
) -> list[Path]:
    """Write the quality record, and the sheet where there are images; the files that were written."""
    seen = survey(rows, found, config.quality_rows)
    record = make_record(found, seen, second)
    written = [folder / "quality.json"]
    write_record(written[0], record)
    say(f"cluster: {record_summary(record)}; {written[0]}")
    if sys.stderr.isatty():
        say(f"cluster: sizes by doublings: {sparkline(record['sizes']['histogram'])}")
    images = images_of(config.data, features) if config.sheet else None
    if images is not None:
        written.append(folder / "clusters.png")
        places = np.flatnonzero(features.valid)
        save_sheet(written[1], images, places, found.labels, seen.distances, len(found.counts), config.sheet)
    return written


def _given_start(config: ClusterConfig, dim: int | None) -> np.ndarray | None:
    """The centroids of a file that --start names, rows having `dim` numbers if that is known; None for a way to start.

    Raises:
        UsageError: neither a file nor a way to start, or a file that does not fit.
    """
    if config.start in STARTS:
        return None
    path = Path(config.start)
    if not path.is_file():
        raise UsageError(
            f"--start {config.start}: no such file; {nearest(config.start, STARTS)}, or a file of centroids"
        )
    return read_start(path, config.k, dim, config.normalise)
