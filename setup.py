"""The four rooms stand at the root of the repository and install inside `ktransfer` (docs/architecture.md)."""

from setuptools import find_packages, setup

ROOMS = ("pretext", "cluster", "retrain", "eval")

setup(
    package_dir={"ktransfer": "ktransfer"} | {f"ktransfer.{folder}": folder for folder in (*ROOMS, "recipes")},
    packages=[
        "ktransfer",
        *(f"ktransfer.{name}" for name in find_packages("ktransfer")),
        *(f"ktransfer.{folder}" for folder in (*ROOMS, "recipes")),
    ],
    package_data={"ktransfer": ["py.typed"], "ktransfer.recipes": ["*.toml"]},
)
