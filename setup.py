"""The four rooms stand at the root of the repository and install inside `ktransfer` (docs/architecture.md)."""

from setuptools import Extension, find_packages, setup

ROOMS = ("pretext", "cluster", "retrain", "eval")

# Loaded by ctypes (cluster/native.py), so it needs no header of Python. Where it does not compile, dense products in
# numpy (cluster/dense.py) stand in.
EXACT = Extension(
    "ktransfer.cluster._exact",
    ["cluster/exact.cpp"],
    depends=["cluster/exact_kernels.hpp", "cluster/exact_tiles.hpp"],
    extra_compile_args=["-O3", "-std=gnu++17", "-ffp-contract=fast", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(
    ext_modules=[EXACT],
    package_dir={"ktransfer": "ktransfer"} | {f"ktransfer.{folder}": folder for folder in (*ROOMS, "recipes")},
    packages=[
        "ktransfer",
        *(f"ktransfer.{name}" for name in find_packages("ktransfer")),
        *(f"ktransfer.{folder}" for folder in (*ROOMS, "recipes")),
    ],
    package_data={
        "ktransfer": ["py.typed"],
        "ktransfer.recipes": ["*.toml"],
        "ktransfer.eval": ["published.csv"],
        "ktransfer.retrain": ["published.csv"],
    },
)
