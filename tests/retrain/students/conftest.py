"""A student that was exported, once for all tests that only read it."""

import shutil

import pytest


@pytest.fixture(scope="session")
def exported(of_classes, tmp_path_factory):
    """A copy of the run of classes, with its export."""
    from ktransfer.retrain import export

    run = tmp_path_factory.mktemp("exported") / "mine"
    shutil.copytree(of_classes, run)
    export(run)
    return run
