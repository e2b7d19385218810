"""The assign stage: the nearest centroid of each image is its pseudo-label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktransfer.artifacts.centroids import Centroids, read_centroids, refuse_mismatch
from ktransfer.artifacts.features import Features, open_features
from ktransfer.artifacts.labels import write_labels
from ktransfer.artifacts.names import grouped, read_names
from ktransfer.config import build
from ktransfer.errors import UsageError
from ktransfer.plan import Plan, PlannedStep, carry_out_line, latest, plan_line
from ktransfer.progress import say
from ktransfer.run import begin, done_record, input_hash

from .algorithms.balanced import assign_balanced
from .algorithms.lloyd import assign_rows
from .config import AssignConfig
from .distributed import open_rows, planned_rows
from .engines.choose import device_of
from .engines.engine import described
from .extraction import ExtractPlan
from .foreign import adopt, adopted, check_keys, is_foreign, open_foreign
from .quality import quality, summary
from .sources import data_of, extraction_alike
from .stage import ClusterPlan
from .views import made_views

BALANCED_BYTES = 144  # of a row, beyond a plain assignment


@dataclass(frozen=True, kw_only=True)
class AssignPlan(Plan):
    """What the stage will do: `features` is the file whose rows get labels, there or still to be made."""

    config: AssignConfig
    features: Path


def assign(run: str | Path, **options: Any) -> Path:
    """Pseudo-labels: the nearest centroid of every image of the same or another data set (docs/papers.md).

    Args:
        run: the run folder; the stage writes `labels.csv`, `labels.h5` and `labels.bin` below `run/clusters`.
        options: the fields of `AssignConfig`.

    Raises:
        UsageError, StageError: one line each.
    """
    made: Path = carry_out_line(plan_line([("assign", options)], Path(run)))[-1]
    return made


def carry_out(plan: AssignPlan) -> Path:
    """Find the nearest centroid of each image, and write the labels in three layouts."""
    run, config, path = plan.run, plan.config, plan.features
    if config.features and is_foreign(config.features):
        adopt(run, config.features, config.keys, config.data, config.overwrite, "assign")
    centroids_path = run / "clusters" / "clusters.h5"
    centroids, features = read_centroids(centroids_path), open_features(path)
    refuse_mismatch(features, centroids)
    inputs = {"features": input_hash(path), "centroids": input_hash(centroids_path)}
    further = made_views(run / "clusters")
    inputs |= {f"view {view.stem}": input_hash(view) for view in further}
    inputs |= {"names": input_hash(Path(config.names))} if config.names else {}
    config = replace(config, features=str(path), data=config.data or data_of(run, path))
    names = ["labels.csv", "labels.h5", "labels.bin"]
    device = "cpu" if config.balanced else device_of(config.engine)
    with begin(run, "clusters", "assign", config, inputs, names, config.overwrite, device) as step:
        if step.done:
            return step.folder / names[0]
        k = len(centroids.centroids)
        prepared = features, centroids.projection, centroids.normalise, k
        costs: dict[str, float] = {}
        if config.balanced:
            extra = BALANCED_BYTES * int(features.valid.sum())
            rows, _ = planned_rows(*prepared, config.memory, "assign", extra)
            even = assign_balanced(rows, centroids.centroids)
            labels, distances, by = even.labels, even.distances, f"balanced, products by numpy {np.__version__}"
            costs = {"cost": even.cost, "least cost possible": even.bound}
            say(
                f"assign: clusters of equal size; cost {even.cost:.8g}, of which the least possible is at least "
                f"{even.bound:.8g}"
            )
        else:
            rows, engine = open_rows(*prepared, config.engine, config.memory, "assign")
            labels, distances = assign_rows(rows, centroids.centroids, engine)
            by = described(engine)
        everywhere = np.full(len(features.valid), -1, np.int32)
        everywhere[features.valid] = labels
        far = np.full(len(features.valid), np.nan, np.float32)
        far[features.valid] = distances
        fingerprint = str(features.attributes.get("fingerprint"))
        more = np.full((len(features.valid), len(further)), -1, np.int32)
        for place, view in enumerate(further):
            more[features.valid, place] = _labels_of(read_centroids(view), features, config)
        given = _named(config, features.keys, everywhere, k, inputs["centroids"])
        to = (step.folder, features.keys, given.labels, far, given.k, inputs["centroids"], fingerprint, more)
        write_labels(*to, given.names, given.clusters)
        result = quality(everywhere, features.targets, k)
        step.finish([step.folder / name for name in names], result=result | costs | {"engine": by})
        say(f"assign: done; {summary(result)}; {step.folder / names[0]}")
        return step.folder / names[0]


class _Given(NamedTuple):
    """What is written: labels, how many there are, their names, and the clusters where these are something else."""

    labels: NDArray[np.int32]
    k: int
    names: list[str]
    clusters: NDArray[np.int32] | None


def _named(config: AssignConfig, keys: list[str], clusters: NDArray[np.int32], k: int, digest: str) -> _Given:
    """The clusters or, where people named them, their groups."""
    if not config.names:
        return _Given(clusters, k, [], None)
    labels, names = grouped(Path(config.names), read_names(Path(config.names)), keys, clusters, k, digest)
    junk = int(((labels < 0) & (clusters >= 0)).sum())
    say(f"assign: {len(names)} groups by {config.names}; {junk} images are junk, and have no label")
    return _Given(labels, len(names), names, clusters)


def _labels_of(view: Centroids, features: Features, config: AssignConfig) -> NDArray[np.int32]:
    """(valid rows,) the nearest centroid of a further clustering."""
    k = len(view.centroids)
    rows, engine = open_rows(features, view.projection, view.normalise, k, config.engine, config.memory, None)
    return assign_rows(rows, view.centroids, engine)[0]


def first(
    run: Path, options: dict[str, Any], before: Sequence[Plan], tables: Mapping[str, Mapping[str, Any]]
) -> list[ExtractPlan]:
    """The extraction that comes before, where images are named whose features no stage of the line makes."""
    config = build(AssignConfig, options, "assign")
    if not config.data or config.features:
        return []
    plan = extraction_alike(run, config.data, _clustered(run, before), before)
    return [] if plan.file in [one.file for one in before if isinstance(one, ExtractPlan)] else [plan]


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = ()) -> AssignPlan:
    """Everything that can be found wrong before the work.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(AssignConfig, options, "assign")
    if config.balanced and config.engine != AssignConfig.engine:
        raise UsageError(
            f"assign --balanced: compares each row with all clusters on the CPU, without an engine; "
            f"leave --engine {config.engine} out"
        )
    check_keys(config.features, config.keys)
    if config.names:
        read_names(Path(config.names))
    images = None
    if config.features and is_foreign(config.features):
        open_foreign(config.features, config.keys, config.data)
        path = adopted(run, config.features)
    elif config.features and config.data:
        raise UsageError("assign: both --features and --data were given; give only what is to be labelled")
    elif config.features:
        path = open_features(Path(config.features)).path
    elif config.data:
        extraction = next(one for one in reversed(before) if isinstance(one, ExtractPlan))
        path, images = extraction.file, extraction.images
    else:
        path = _clustered(run, before)
    return AssignPlan(
        stage="assign",
        run=run,
        steps=[PlannedStep("assign", config, {}, reads=("cluster", *(["extract"] if images else [])))],
        overwrite=config.overwrite,
        images=images,
        config=config,
        features=path,
    )


def _clustered(run: Path, before: Sequence[Plan]) -> Path:
    """The feature file whose rows were clustered, or will be by the line.

    Raises:
        UsageError: nothing was clustered.
    """
    coming = latest(before, "cluster")
    if isinstance(coming, ClusterPlan):
        return coming.features
    path = Path(done_record(run, "clusters", "cluster", "cluster")["config"]["features"])
    return path if path.is_file() else run / "features" / path.name  # the run folder was moved
