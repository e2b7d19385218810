"""Networks of an arm's architecture with a classifier for the labels, and what of them lies before a layer."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.networks import TRUNKS, Network


class WithHead(nn.Module):
    """A trunk of VGG-16 that ends at conv4_3, averaged over its maps, and one linear layer: there is no paper's head.

    The trunk's weights keep their names; those of the layer begin with `networks.HEAD`, so that the trunk alone can be
    loaded again. (batch, 3, h, w) -> (batch, classes).
    """

    def __init__(self, trunk: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        for name, module in trunk.named_children():
            self.add_module(name, module)
        self.trunk = [name for name, _ in trunk.named_children()]
        self.head = nn.Linear(channels, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        for name in self.trunk:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def with_classes(network: Network, classes: int, seed: int, purpose: str) -> nn.Module:
    """A whole network of that architecture with fresh weights, a function of (network, classes, seed, purpose).

    An AlexNet gets fc6, fc7 and fc8, a network of torchvision its own classifier, the trunk of a VGG a linear layer on
    its averaged maps (`WithHead`).
    """
    if network.arch in TRUNKS[2:] and not network.classes:
        trunk = networks.build(network, seed, purpose)
        with torch.no_grad():
            channels = trunk(torch.zeros(1, 3, 32, 32)).shape[1]
        return WithHead(trunk, channels, classes)
    return networks.build(Network(**(network.__dict__ | {"classes": classes})), seed, purpose)


class Before(NamedTuple):
    """What of a network lies before a place in it.

    Attributes:
        names: of its weights and buffers, as in `state_dict`.
        modules: whose work is done there.
    """

    names: frozenset[str]
    modules: tuple[str, ...]


def before(model: nn.Module, path: str, size: int) -> Before:
    """What a network computes up to the output of the module at `path`, by watching it work on two images of `size`.

    A module whose output is there by then belongs to it with all that it holds. Of one that is still at work only its
    own weights do: those of a vision transformer's class token and positions, which come before its blocks.
    """
    started: list[str] = []
    finished: list[str] = []
    reached = False

    def start(name: str) -> None:
        if not reached:
            started.append(name)

    def finish(name: str) -> None:
        nonlocal reached
        if not reached:
            finished.append(name)
        reached = reached or name == path

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _m, _i, name=name: start(name)))
        hooks.append(module.register_forward_hook(lambda _m, _i, _o, name=name: finish(name)))
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model.eval()(torch.zeros(2, 3, size, size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    assert reached, f"no module {path}"
    names = frozenset(
        name
        for name in model.state_dict()
        if name.rpartition(".")[0] in started or any(name.startswith(f"{module}.") for module in finished)
    )
    return Before(names, tuple(finished))


def trunk(network: Network, model: nn.Module) -> Before:
    """All of a network but its classifier: fc6 to fc8 of an AlexNet, the last child that has weights of any other; of a
    module of one's own the weights that depend on the number of classes."""
    own = networks.classifier_names(network)
    if own:
        kept = frozenset(model.state_dict()) - own
        whole = [
            name
            for name, _ in model.named_modules()
            if name and not any(f"{one}.".startswith(f"{name}.") for one in own)
        ]
        return Before(kept, tuple(whole))
    children = [name for name, child in model.named_children() if child.state_dict()]
    head = networks.CLASSIFIER if isinstance(model, networks.AlexNet) else (f"{children[-1]}.",)
    names = frozenset(name for name in model.state_dict() if not name.startswith(head))
    return Before(names, tuple(name for name in children if not f"{name}.".startswith(head)))


def copied(model: nn.Module, source: nn.Module, names: Iterable[str]) -> nn.Module:
    """`model` with the weights and buffers `names` of `source`."""
    theirs = source.state_dict()
    model.load_state_dict(model.state_dict() | {name: theirs[name] for name in names})
    return model


def unit_variance(model: nn.Module, x: Tensor) -> None:
    """Scale every convolution and linear layer in place, so that its outputs have unit variance on a batch.

    The data-dependent scaling of Kraehenbuehl et al. ("Data-dependent Initializations of Convolutional Neural
    Networks", 2016), one number for a layer, so that the directions which it learned stay: weights and bias are divided
    by the deviation of the layer's outputs over images, channels and places; layers in the order in which they work,
    so that each sees the scaled outputs of those before. A layer whose outputs do not differ stays as it is.

    Args:
        x: (b, 3, size, size), normalised.
    """

    def scale(module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        deviation = out.double().var(correction=0).sqrt().to(out.dtype)
        if not deviation > 0:
            return out
        assert isinstance(module, nn.Conv2d | nn.Linear)
        module.weight.div_(deviation)
        if module.bias is not None:
            module.bias.div_(deviation)
        return out / deviation

    affine = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(scale) for module in affine]
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
