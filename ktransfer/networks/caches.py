"""Weights that other programs have downloaded: the cache folders of torch and of Hugging Face, by name."""

import os
import re
from pathlib import Path
from typing import Any

import torch

_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def torch_folder() -> Path:
    """Where torch keeps weights: below TORCH_HOME, else in the cache folder of the user."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def repository(name: str) -> Path | None:
    """The folder of ORGANISATION/NAME of Hugging Face, of the revision fetched last; None where it is not in the cache.

    The folder of the cache is HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub.
    """
    if not _REPOSITORY.fullmatch(name):
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    folder = cache / f"models--{name.replace('/', '--')}"
    try:
        named = [folder / "snapshots" / (folder / "refs" / "main").read_text("utf-8").strip()]
    except (OSError, ValueError):
        named = []
    others = sorted((folder / "snapshots").glob("*"), key=lambda path: (path.stat().st_mtime, path.name), reverse=True)
    return next((path for path in (*named, *others) if path.is_dir()), None)


def file(name: str) -> Path | None:
    """The file of weights that a name stands for in a cache: ORGANISATION/NAME, or that of a file of torch's."""
    folder = repository(name)
    if folder:
        return next((folder / one for one in _FILES if (folder / one).is_file()), None)
    found = torch_folder() / name
    return found if Path(name).name == name and found.is_file() else None


def of_timm(stated: dict[str, Any]) -> Path | None:
    """The weights that timm would load for a network, where they are in a cache.

    Args:
        stated: its `pretrained_cfg`.
    """
    url, identifier = stated.get("url"), stated.get("hf_hub_id")
    for name in (identifier, url and str(url).rsplit("/", 1)[-1]):
        found = file(str(name)) if name else None
        if found:
            return found
    return None
