"""The assign stage: the nearest centroid of each image is its pseudo-label."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktransfer.artifacts.centroids import Centroids, read_centroids, refuse_mismatch
from ktransfer.artifacts.features import Features, open_features
from ktransfer.artifacts.labels import write_labels
from ktransfer.config import build
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.plan import Plan, PlannedStep, latest
from ktransfer.progress import say
from ktransfer.run import begin, done_record, input_hash

from .algorithms.balanced import assign_balanced
from .algorithms.lloyd import assign_rows
from .config import AssignConfig
from .distributed import open_rows, planned_rows
from .engines.choose import device_of
from .engines.engine import described
from .foreign import adopt, check_keys, is_foreign, open_foreign
from .quality import quality, summary
from .sources import data_of, labelled_features
from .views import made_views

BALANCED_BYTES = 144  # of a row, beyond a plain assignment


@dataclass(frozen=True, kw_only=True)
class AssignPlan(Plan):
    """What the stage will do."""

    config: AssignConfig


def assign(run: str | Path, **options: Any) -> Path:
    """Pseudo-labels: the nearest centroid of every image of the same or another data set (docs/papers.md).

    Args:
        run: the run folder; the stage writes `labels.csv`, `labels.h5` and `labels.bin` below `run/clusters`.
        options: the fields of `AssignConfig`.

    Raises:
        UsageError, StageError: one line each.
    """
    return carry_out(check(Path(run), options))


def carry_out(plan: AssignPlan) -> Path:
    """Find the features of the images, the nearest centroid of each, and write the labels in three layouts."""
    run, config = plan.run, plan.config
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
    refuse_mismatch(features, centroids)
    spec = config.data or data_of(run, path)
    inputs = {"features": input_hash(path), "centroids": input_hash(centroids_path)}
    further = made_views(run / "clusters")
    inputs |= {f"view {view.stem}": input_hash(view) for view in further}
    config = replace(config, features=str(path), data=spec)
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
        write_labels(step.folder, features.keys, everywhere, far, k, inputs["centroids"], fingerprint, more)
        result = quality(everywhere, features.targets, k)
        step.finish([step.folder / name for name in names], result=result | costs | {"engine": by})
        say(f"assign: done; {summary(result)}; {step.folder / names[0]}")
        return step.folder / names[0]


def _labels_of(view: Centroids, features: Features, config: AssignConfig) -> NDArray[np.int32]:
    """(valid rows,) the nearest centroid of a further clustering."""
    k = len(view.centroids)
    rows, engine = open_rows(features, view.projection, view.normalise, k, config.engine, config.memory, "assign")
    return assign_rows(rows, view.centroids, engine)[0]


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
    if config.features and is_foreign(config.features):
        open_foreign(config.features, config.keys, config.data)
    elif config.features and config.data:
        raise UsageError("assign: both --features and --data were given; give only what is to be labelled")
    elif config.features:
        open_features(Path(config.features))
    if latest(before, "cluster") is None:
        done_record(run, "clusters", "cluster", "cluster")
    return AssignPlan(
        stage="assign",
        run=run,
        steps=[PlannedStep("assign", config, {}, reads=("cluster",))],
        overwrite=config.overwrite,
        images=open_dataset(config.data) if config.data else None,
        config=config,
    )
