"""What must hold of an `nn.Module` of one's own before it is trained for hours (`--arch pkg.module:function`)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import Network, functions
from ktransfer.networks.network import content
from ktransfer.networks.own_modules import CONTRACT


def check(network: Network, several: bool) -> None:
    """Build it, let it look at two images, and write it, in memory.

    Args:
        network: what it will be.
        several: whether it will keep only the first of the outputs that it is trained with.

    Raises:
        UsageError: it cannot be called, makes something else than (batch, outputs), is made differently each time, has
            no weights, or cannot be written.
    """
    two = replace(network, classes=2)
    model, again = (networks.build(two, 0, "check") for _ in range(2))
    if not any(value.requires_grad for value in model.parameters()):
        raise UsageError(f"--arch {network.arch}: has no weights that could learn; {CONTRACT}")
    try:
        content(model.state_dict(), two)
    except Exception as error:  # of safetensors: weights that share memory; or what is no tensor
        raise UsageError(
            f"--arch {network.arch}: its weights cannot be written: {functions.told(error)}; give each its own tensor"
        ) from error
    _refuse_changing(network.arch, model, again)
    images = torch.zeros(2, 3, network.size, network.size)
    for one, outputs in ((model.train(), 2), (networks.build(replace(network, classes=3), 0, "check").eval(), 3)):
        found = _seen(network.arch, one, images)
        if found.shape != (2, outputs) or not found.is_floating_point():
            raise UsageError(
                f"--arch {network.arch}: made {tuple(found.shape)} of 2 images for {outputs} outputs; {CONTRACT}"
            )
    if several:
        _refuse_unnarrowed(network, again, images)


def narrowed(wider: nn.Module, network: Network) -> dict[str, Tensor]:
    """The weights of `network`, which has fewer outputs than the model that was trained: the first of them."""
    wanted = networks.build(network, 0, "shapes").state_dict()
    return {name: value[: len(wanted[name])] if value.ndim else value for name, value in wider.state_dict().items()}


def _refuse_changing(arch: str, model: nn.Module, again: nn.Module) -> None:
    first, second = model.state_dict(), again.state_dict()
    shared = {value.data_ptr() for value in first.values()} & {value.data_ptr() for value in second.values()} - {0}
    if model is again or shared:
        raise UsageError(f"--arch {arch}: returns the same weights each time it is called; make a new module in it")
    same = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    if not same:
        raise UsageError(
            f"--arch {arch}: starts from other weights each time, so that a run could not be repeated; draw them with "
            "torch alone, and let it seed itself"
        )


def _refuse_unnarrowed(network: Network, small: nn.Module, images: Tensor) -> None:
    wide = networks.build(replace(network, classes=3), 0, "check").eval()
    images = images + torch.linspace(-1, 1, images.numel()).view_as(images)
    try:
        small.eval().load_state_dict(narrowed(wide, replace(network, classes=2)))
        same = torch.allclose(_seen(network.arch, small, images), _seen(network.arch, wide, images)[:, :2], atol=1e-4)
    except RuntimeError:
        same = False
    if not same:
        raise UsageError(
            f"--objective multi: keeps the first outputs of {network.arch}, which depend on how many there are; let "
            "its last layer alone do so, or give --objective clusters"
        )


def _seen(arch: str, model: nn.Module, images: Tensor) -> Tensor:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found = model(images)
    except Exception as error:  # it is not ours
        shape = tuple(images.shape)
        raise UsageError(f"--arch {arch}: raised {functions.told(error)} of {shape} float32; {CONTRACT}") from error
    if not isinstance(found, Tensor):
        raise UsageError(f"--arch {arch}: made {type(found).__name__}; {CONTRACT}")
    return found
