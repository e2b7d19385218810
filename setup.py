"""The four rooms stand at the root of the repository and install inside `ktransfer` (docs/architecture.md)."""

from setuptools import Extension, find_packages, setup

ROOMS = ("pretext", "cluster", "retrain", "eval")

# Loaded by ctypes (cluster/engines/native.py), so it needs no header of Python. Where it does not compile, dense
# products in numpy (cluster/engines/dense.py) stand in.
EXACT = Extension(
    "ktransfer.cluster.engines._exact",
    ["cluster/engines/exact.cpp"],
    depends=["cluster/engines/exact_kernels.hpp", "cluster/engines/exact_tiles.hpp"],
    extra_compile_args=["-O3", "-std=gnu++17", "-ffp-contract=fast", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)

FOLDERS = {"ktransfer": "ktransfer"} | {f"ktransfer.{folder}": folder for folder in (*ROOMS, "recipes")}

setup(
    ext_modules=[EXACT],
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{sub}" for sub in find_packages(folder)))
    ],
    include_package_data=False,  # a wheel has the extension, not its sources
    package_data={
        "ktransfer": ["py.typed"],
        "ktransfer.report": ["assets/*"],
        "ktransfer.recipes": ["*.toml"],
        "ktransfer.eval": ["published.csv"],
        "ktransfer.retrain.selftraining": ["published.csv"],
    },
)
