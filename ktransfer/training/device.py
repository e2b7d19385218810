"""The device and the arithmetic that the settings name."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktransfer.errors import UsageError
from ktransfer.training.options import MachineOptions


def choose_device(options: MachineOptions) -> torch.device:
    """The device that `--device` names.

    Raises:
        UsageError: it is not there.
    """
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: no such device; give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: not supported; give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; give cpu")
    return device


def move(model: nn.Module, device: torch.device) -> None:
    """Move a network to the device, its weights with the channels last."""
    model.to(device)
    to: Any = model.to  # of which torch 2.11 has no type with memory_format
    to(memory_format=torch.channels_last)


def bfloat16(options: MachineOptions, device: torch.device) -> bool:
    """Whether convolutions and products are computed in bfloat16; `auto`: where the hardware multiplies it faster."""
    if options.precision != "auto":
        return options.precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


def autocast(options: MachineOptions, device: torch.device) -> torch.autocast:
    """The arithmetic that `--precision` names."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16(options, device))


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def constant(values: Any, device: torch.device) -> Tensor:
    """Numbers in nested sequences as a tensor, which a GPU gets without its queue being waited for."""
    return torch.tensor(values).to(device, non_blocking=True)
