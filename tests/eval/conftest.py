"""Images whose labels can be seen: a protocol that learns must find them, and one that cheats needs no labels."""

import hashlib

import numpy as np
import pytest

from ktransfer.data.dataset import Dataset

COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="session")
def painted():
    """(rows, seed, several labels?) -> noisy images of 40 pixels with a bright channel for each colour they have."""

    def make(count, seed, several=False):
        draws = np.random.default_rng(seed)
        targets = np.arange(count) % 3
        tags = draws.integers(0, 2, (count, 3)).astype(np.int8) if several else np.eye(3, dtype=np.int8)[targets]
        images = draws.integers(0, 120, (count, 40, 40, 3)) + 100 * tags[:, None, None, ::-1]
        images = images.astype(np.uint8)
        return Dataset(
            spec="painted",
            name=f"painted{seed}",
            keys=tuple(f"{row}" for row in range(count)),
            targets=np.full(count, -1, np.int32) if several else targets.astype(np.int32),
            classes=COLOURS,
            fingerprint=hashlib.sha256(images.tobytes() + tags.tobytes()).hexdigest(),
            read=lambda row, side: images[row],
            short_side=lambda row: 40,
            tags=tags if several else None,
        )

    return make


@pytest.fixture
def small_student(tmp_path):
    """A run folder that holds a finished small AlexNet."""
    from ktransfer import networks
    from ktransfer.eval.config import EvalConfig
    from ktransfer.networks import Network
    from ktransfer.run import begin

    network = Network("alexnet_bn", 0.25, size=64, classes=10, task="pseudo-labels")
    run, names = tmp_path / "run", ["model.safetensors"]
    with begin(run, "retrain", "retrain", EvalConfig(labelled="scenes:"), {}, names, False, "cpu") as step:
        path = step.folder / names[0]
        networks.save(path, networks.build(network, 5, "test").state_dict(), network)
        step.finish([path])
    return run
