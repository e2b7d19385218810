"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs as far as their machine code."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

INTERPRETED = """
import numpy as np, torch
from ktransfer.cluster.engines import device, device_steps, triton_kernels
from ktransfer.cluster.engines.engine import Rows, faiss_engine

device_steps.trial(triton_kernels, torch.device("cpu"))
device._kernels = lambda where, tell: triton_kernels
rng = np.random.default_rng(0)
for n, d, k, weighed in ((140, 40, 50, False), (60, 300, 37, True), (30, 1100, 20, True)):
    data = rng.normal(size=(n, d)).astype(np.float32)
    data[3:6] = data[9]
    data *= np.float32(1 + 1000 * (d == 40))
    rows = Rows(n, d, lambda start, stop: data[start:stop], rng.random(n) + 0.1 if weighed else None)
    centroids = data[:k].copy()
    engine, peer = device.device_engine("cpu"), faiss_engine()
    found, right = (one.scan(rows, centroids, lambda done: None) for one in (engine, peer))
    np.testing.assert_array_equal(found.labels, right.labels)
    np.testing.assert_array_equal(found.counts, right.counts)
    np.testing.assert_allclose(found.distances, right.distances, rtol=1e-6)
    np.testing.assert_allclose(found.sums, right.sums, rtol=1e-12, atol=1e-9)

# Each tile, and a second centroid that is exactly as good as the first.
rows = torch.from_numpy(rng.integers(-8, 9, (70, 48)).astype(np.float16))
centroids = torch.cat([rows[:45], rows[:45]])
by, bias = torch.full((70,), 0.5), -torch.arange(90).remainder(45).float()
scores = (rows.float() @ centroids.float().T) * 0.5 + bias
best, labels = scores.max(dim=1)
for tile in triton_kernels.WHOLE_TILES:
    found = triton_kernels.nearest_two(rows, by, centroids, bias, tile)
    assert torch.equal(found[0].long(), scores.argmax(dim=1)) and torch.equal(found[1], best)
    assert torch.equal(found[2], best)
wide = torch.cat([rows] * 6, dim=1).contiguous(), torch.cat([centroids] * 6, dim=1).contiguous()
for tile in triton_kernels.TILES:
    found = triton_kernels.nearest_two(wide[0], by / 6, wide[1], bias, tile)
    assert torch.equal(found[0].long(), scores.argmax(dim=1))
    assert torch.allclose(found[1], best, atol=1e-3) and torch.allclose(found[2], best, atol=1e-3)
"""

COMPILED = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ktransfer.cluster import triton_kernels as kernels

FLOATS = {"rows": "*fp16", "centroids": "*fp16", "ratios": "*fp32", "bias": "*fp32", "scores": "*fp32"}
TYPES = FLOATS | {"labels": "*i32", "bests": "*fp32", "seconds": "*fp32", "wide": "*fp32", "weights": "*fp64"}
TYPES |= {"order": "*i64", "edges": "*i64", "raw": "*fp32", "sums": "*fp64", "squares": "*fp64"}

def shared(kernel, capability, warps, stages, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    whole = {(names.index(name),): [["tt.divisibility", 16]] for name in names if TYPES.get(name) or name == "width"}
    made = compile(
        ASTSource(kernel, signature, fixed, whole),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    assert made.asm["cubin"]
    return made.metadata.shared, "wgmma" in made.asm["ptx"]

found = {}
for capability in (80, 90):
    first = kernels.WHOLE_TILES[0]
    sizes = dict(tile_rows=first.rows, tile_centroids=first.centroids)
    found[f"whole {capability}"] = shared(
        kernels._nearest_two, capability, first.warps, first.stages, **sizes, tile_columns=256, whole=True, even=True
    )
    second = kernels.TILES[1]
    sizes = dict(tile_rows=second.rows, tile_centroids=second.centroids, tile_columns=second.columns)
    found[f"pieces {capability}"] = shared(
        kernels._nearest_two, capability, second.warps, second.stages, **sizes, whole=False, even=True
    )
found["top two"] = shared(kernels._top_two, 90, 4, 3, tile_rows=4, tile_centroids=1024)
TYPES |= {"places": "*i64", "near": "*i64", "middle": "*fp32", "lengths": "*fp64"}
found["recheck"] = shared(kernels._pair_squares, 90, 4, 3, tile_pairs=4, tile_columns=512)
found["sums"] = shared(kernels._add_rows, 90, 4, 3, weighted=True, tile_rows=16, tile_columns=256)
print(json.dumps(found))
"""


def python(script, cache, **variables):
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
    )


def test_interpreted_kernels_give_the_labels_of_faiss(tmp_path):
    done = python(INTERPRETED, tmp_path, TRITON_INTERPRET="1")
    if "only 0-dimensional arrays" in done.stderr and "triton/runtime/interpreter.py" in done.stderr:
        pytest.skip("this Triton's interpreter (3.6, say) does not go with numpy 2.4")
    assert done.returncode == 0, done.stderr


def test_kernels_compile_for_gpus(tmp_path):
    """Also where none is: Triton brings its compiler. A Hopper has 227 KiB of shared memory a block, an A100 163."""
    done = python(COMPILED, tmp_path)
    if "No module named" in done.stderr or "cannot import name" in done.stderr:
        pytest.skip(f"this Triton cannot compile without a GPU: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (shared, hopper) in found.items():
        assert shared <= (163 if "80" in name else 227) * 1024 or name == "whole 80"
        assert hopper == ("90" in name)  # its tensor cores are used


class Clock:
    """A GPU's event; an interval takes what the last launches took."""

    now = 0.0

    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = Clock.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


def test_the_fastest_tile_that_is_right_is_taken(monkeypatch):
    from ktransfer.cluster.engines import triton_kernels as kernels

    monkeypatch.setattr(torch.cuda, "Event", Clock)
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
    found = torch.zeros(50, dtype=torch.int32), torch.empty(50), torch.empty(50)
    # Milliseconds of each tile, and how far its second scores are off; None: it raises.
    behaviour = {"slow": (5, 0), "wrong": (1, 0.5), "broken": None, "too large": None, "fast": (2, 1e-6), "mid": (3, 0)}

    def launch(tile):
        if behaviour[tile] is None:
            raise RuntimeError("PassManager::run failed")
        taken, off = behaviour[tile]
        Clock.now += taken
        found[1].copy_(scores)
        found[2].copy_(scores - 1 + off)

    assert kernels._fastest(launch, tuple(behaviour), found) == "fast"
    with pytest.raises(RuntimeError, match="no tile fits"):
        kernels._fastest(launch, ("broken", "too large"), found)
    scores[3] = -torch.inf
    scores[4] = torch.nan
    assert kernels._fastest(launch, ("wrong", "fast"), found) == "wrong"  # the first is the measure
    assert kernels._fastest(launch, ("slow", "wrong", "mid"), found) == "mid"
