"""The cluster stage: features in, centroids out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ktransfer import files
from ktransfer.artifacts.centroids import Projection
from ktransfer.artifacts.features import Features, open_features
from ktransfer.config import build, nearest
from ktransfer.errors import UsageError
from ktransfer.machine import stderr
from ktransfer.plan import Plan, PlannedStep, carry_out_line, latest, plan_line
from ktransfer.progress import say
from ktransfer.run import begin, input_hash

from . import views
from .algorithms.initialisation import STARTS, sample_size, start_of
from .algorithms.lloyd import Clustering, kmeans, refuse_sizes
from .algorithms.minibatch import minibatch_kmeans
from .algorithms.restarts import best_of
from .algorithms.two_level import two_level
from .centroids import read_start, write_centroids
from .config import ClusterConfig
from .distributed import open_rows
from .engines.choose import device_of, parts_engine
from .engines.engine import Engine, Rows
from .extraction import ExtractPlan
from .feature_check import check_features
from .foreign import adopt, adopted, check_keys, is_foreign, preview
from .projection import fit_projection
from .quality import sparkline
from .record import derived_seed, make_record, record_summary, survey, write_record
from .rows import plan_memory
from .sheet import images_of, save_sheet
from .sources import data_of, features_path, outdated

OUTPUTS = ("clusters.h5", "quality.json", "clusters.png", views.FOLDER, "work")


@dataclass(frozen=True, kw_only=True)
class ClusterPlan(Plan):
    """What the stage will do: `features` is the file whose rows are clustered, there or still to be made."""

    config: ClusterConfig
    features: Path


def cluster(run: str | Path, **options: Any) -> Path:
    """k-means on all features of the run; they are extracted first where they are missing (paper §3.2).

    Args:
        run: the run folder; the stage writes `clusters.h5`, `quality.json` and, where it has the images,
            `clusters.png` below `run/clusters`.
        options: the fields of `ClusterConfig`.

    Raises:
        UsageError, StageError: one line each.
    """
    made: Path = carry_out_line(plan_line([("cluster", options)], Path(run)))[-1]
    return made


def carry_out(plan: ClusterPlan) -> Path:
    """Look for the centroids of the features; write them, how good they are, and a sheet."""
    run, config, path = plan.run, plan.config, plan.features
    if config.features and is_foreign(config.features):
        adopt(run, config.features, config.keys, config.data, config.overwrite, "cluster")
    features = open_features(path)
    _refuse_rows(config, int(features.valid.sum()), features.rows.shape[1])
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
        projection = fit_projection(features, config.pca, config.whiten) if config.pca else None
        found, written = _clustered(config, features, projection, start, step.folder)
        further = views.make_views(
            step.folder,
            views.views(config.k, config.views),
            lambda view, path: _view(config, features, projection, view, path, work),
        )
        sizes = np.sort(found.counts)
        step.finish(
            [*written, *further],
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


def _clustered(
    config: ClusterConfig, features: Features, projection: Projection | None, start: str, folder: Path
) -> tuple[Clustering, list[Path]]:
    """The clustering of all rows, evaluated; and the files that were written of it."""
    count, columns = int(features.valid.sum()), features.rows.shape[1]
    dim = config.pca or columns
    given = _given_start(config, dim)
    more = _extra_bytes(config, count, dim, columns)
    rows, engine = open_rows(
        features, projection, config.normalise, config.k, config.engine, config.memory, "cluster", *more
    )
    clustered = _clusterer(config, rows, engine, given, len(features.valid), folder / "work")
    found = replace(clustered(seed=config.seed), start=start)
    file = folder / "clusters.h5"
    write_centroids(file, found, projection, config.normalise, features)
    second = clustered(seed=derived_seed(config.seed), name="stability") if config.stability else None
    return found, [file, *_evaluate(folder, config, features, rows, found, second)]


def _view(
    config: ClusterConfig, features: Features, pca: Projection | None, view: views.View, path: Path, work: Path
) -> None:
    """Write a further clustering."""
    turned = views.random_projection(features, pca, config.seed, view.number)
    dim = turned.components.shape[1]
    more = _extra_bytes(config, int(features.valid.sum()), dim, features.rows.shape[1])
    opened = open_rows(features, turned, config.normalise, view.k, config.engine, config.memory, None, *more)
    clustered = _clusterer(replace(config, k=view.k), *opened, None, len(features.valid), work)
    found = clustered(seed=config.seed, name=f"view-{view.number}")
    write_centroids(path, found, turned, config.normalise, features)


def first(
    run: Path, options: dict[str, Any], before: Sequence[Plan], tables: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """The extraction that comes before, where features are missing or a file has settings for them, or where the line
    makes their teacher anew.
    """
    config = build(ClusterConfig, options, "cluster")
    if config.features or latest(before, "extract"):
        return []
    teacher = latest(before, "pretext")
    again = teacher is not None and (teacher.overwrite or outdated(run, config.data))
    if not again and "extract" not in tables and features_path(run, config):
        return []
    given = ({"data": config.data} if config.data else {}) | dict(tables.get("extract", {}))
    return [("extract", given | ({"overwrite": True} if again else {}))]


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = ()) -> ClusterPlan:
    """Everything that can be found wrong before the work, k against the number of images first of all.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(ClusterConfig, options, "cluster")
    check_keys(config.features, config.keys)
    if config.whiten and not config.pca:
        raise UsageError("--whiten: needs the principal components; give --pca too")
    if config.spherical and not config.normalise:
        raise UsageError("--spherical: needs rows of length 1; leave --no-normalise out")
    _refuse_foreign_settings(config)
    if 0 < config.start_sample < config.k:
        raise UsageError(
            f"--start-sample {config.start_sample}: fewer rows than the {config.k} clusters; give at least {config.k}"
        )
    if config.start not in STARTS and (config.redo > 1 or config.stability or config.views > 1):
        raise UsageError(
            f"--start {config.start}: --redo, --stability and --views need different starts, and a file gives one; "
            "leave them out"
        )
    coming = None if config.features else latest(before, "extract")
    memory = 0
    if isinstance(coming, ExtractPlan):
        path, count, columns = coming.file, len(coming.images), coming.dim
        _refuse_rows(config, count, columns)
    else:
        path = _features(run, config)
        if is_foreign(str(path)):
            features, path = preview(str(path), config.keys, config.data), adopted(run, str(path))
        else:
            features = open_features(path)
        count, columns = int(features.valid.sum()), features.rows.shape[1]
        _refuse_rows(config, count, columns)
        dim = config.pca or columns
        need = plan_memory(features, config.k, dim, config.memory, *_extra_bytes(config, count, dim, columns))
        memory = need.fixed + need.engine + need.kept * need.width
    _given_start(config, config.pca or columns)
    reads = () if config.features else ("extract",)
    disk = 4 * config.k * (config.pca or columns)
    return ClusterPlan(
        stage="cluster",
        run=run,
        steps=[PlannedStep("cluster", config, {}, reads, disk=disk, memory=memory)],
        overwrite=config.overwrite,
        config=config,
        features=path,
    )


def _features(run: Path, config: ClusterConfig) -> Path:
    """The file of features, which is there."""
    found = features_path(run, config)
    if found is None:
        raise UsageError(f"--run {run}: features are missing; make them first: ktransfer --run {run} extract")
    return found


def _refuse_rows(config: ClusterConfig, count: int, columns: int) -> None:
    """UsageError where `count` rows of `columns` numbers do not make so many clusters."""
    if config.pca > columns:
        raise UsageError(f"--pca {config.pca}: the features have {columns} numbers; give a smaller one")
    if config.k > count:
        raise UsageError(f"--k {config.k}: more clusters than the {count} images; give a smaller --k")
    most = views.most_clusters(config.k, config.views)
    if most > count:
        raise UsageError(
            f"--views {config.views}: one of them has {most} clusters, more than the {count} images; give a smaller --k"
        )
    if config.pca >= count:
        raise UsageError(f"--pca {config.pca}: must be below the number of images, {count}; give a smaller one")
    refuse_sizes(most, config.min_size, count)


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
            raise UsageError(
                f"--algorithm {config.algorithm}: has no --{flag}; leave it out or choose another algorithm"
            )


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
    if stderr().isatty():
        say(f"cluster: sizes in powers of two: {sparkline(record['sizes']['histogram'])}")
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
