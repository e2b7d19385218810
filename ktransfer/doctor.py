"""`ktransfer doctor`: what is installed, which devices there are, and whether torch and faiss work together."""

import importlib.util
import platform
from pathlib import Path

import numpy as np
import torch

from ktransfer.run import versions
from ktransfer.stages import EXTENSION
from ktransfer.training.device import bfloat16, choose_device
from ktransfer.training.options import MachineOptions


def report() -> str:
    """Lines for people; a part that fails says so instead of stopping the others."""
    lines = [f"{name:14} {version}" for name, version in versions().items()]
    device = choose_device(MachineOptions())
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    lines.append(f"{'machine':14} {platform.machine()}, {torch.get_num_threads()} threads, {_memory()}")
    lines.append(f"{'GPUs':14} {', '.join(names) or 'none'}")
    lines.append(f"{'device':14} {device}, bfloat16 {'on' if bfloat16(MachineOptions(), device) else 'off'}")
    lines.append(f"{'faiss':14} {_faiss()}")
    built = importlib.util.find_spec(EXTENSION) is not None
    lines.append(f"{'exact k-means':14} {'extension built' if built else 'no extension (no compiler at installation)'}")
    return "\n".join(lines)


def _memory() -> str:
    try:
        first = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()[0]
        return f"{int(first.split()[1]) / 1e6:.0f} GB memory"
    except (OSError, ValueError, IndexError):
        return "memory unknown"


def _faiss() -> str:
    try:
        import faiss
    except ImportError as error:
        return f"cannot be imported ({error}); pip install faiss-cpu"
    rows = torch.rand(100, 8).numpy()
    _, nearest = faiss.knn(rows, rows, 1)
    right = bool((nearest[:, 0] == np.arange(100)).all())
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    return f"{'works' if right else 'gives wrong neighbours'}, {gpus} GPUs"
