"""Target networks to be exported and used: of classes, and of clusters."""

import pytest

SMALL = {"arch": "alexnet_bn", "width": 0.05, "stride": 2, "size": 40, "epochs": 1, "batch": 8, "device": "cpu"}


@pytest.fixture(scope="session")
def of_classes(tmp_path_factory):
    """A run whose target network learned the twelve classes of scenes:."""
    from ktransfer.retrain import retrain

    run = tmp_path_factory.mktemp("classes") / "mine"
    retrain(run, data="scenes:images=40,size=48", labels="classes", **SMALL)
    return run


@pytest.fixture(scope="session")
def of_clusters(tmp_path_factory):
    """A run whose target network learned three clusters from a list."""
    from ktransfer.data.opening import open_dataset
    from ktransfer.retrain import retrain

    run = tmp_path_factory.mktemp("clusters") / "mine"
    labels = run.with_name("labels.csv")
    keys = open_dataset("scenes:images=40,size=48").keys
    labels.write_text("key,label\n" + "".join(f"{key},{row % 3}\n" for row, key in enumerate(keys)))
    retrain(run, data="scenes:images=40,size=48", labels=str(labels), **SMALL)
    return run
