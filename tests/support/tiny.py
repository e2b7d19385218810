"""The smallest settings with which a self-training makes all of its files; tests add what they are about."""

from typing import Any

SELFTRAIN: dict[str, Any] = {
    "labelled": "scenes:images=16,size=64",
    "fraction": 0.5,
    "backbone": "alexnet_bn",
    "width": 0.05,
    "channels": 16,
    "size": 64,
    "epochs": 1,
    "batch": 4,
    "lr": 0.1,
    "threshold": 0.0,
    "precision": "float32",
}
