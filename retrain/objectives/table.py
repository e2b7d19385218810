"""The objectives by name."""

from importlib import import_module

import torch

from ..config import RetrainConfig
from .objective import Known, Objective


def open_objective(config: RetrainConfig, known: Known, device: torch.device) -> Objective:
    """The objective that `--objective` names: `objective` of the file of that name."""
    made: Objective = import_module(f".{config.objective}", __package__).objective(known, config.temperature, device)
    return made
