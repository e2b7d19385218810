"""The four rooms stand at the root of the repository and install inside `ktransfer` (docs/architecture.md)."""

from setuptools import find_packages, setup

ROOMS = ("pretext", "cluster", "retrain", "eval")

setup(
    package_dir={"ktransfer": "ktransfer"} | {f"ktransfer.{room}": room for room in ROOMS},
    packages=[
        "ktransfer",
        *(f"ktransfer.{name}" for name in find_packages("ktransfer")),
        *(f"ktransfer.{room}" for room in ROOMS),
    ],
)
