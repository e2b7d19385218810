"""Networks by name, and weights that say what they are.

Architectures and sizes: docs/papers.md. `alexnet` is the paper's (96-256-384-384-256, grouped convolutions,
local response normalisation), `alexnet_bn` the same with batch norm in its place; `vgg16` and `vgg16_bn` are
torchvision's; every other classifier of torchvision goes by its own name (`torchvision:alexnet` for its AlexNet);
`timm:NAME` is timm's, `transformers:FOLDER` that of a folder of Hugging Face, `pkg.module:function` one's own
(`own_modules.py`), `hog`, `pixels` and `function:NAME` are no networks but read like ones (`descriptors.py`,
`functions.py`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ktransfer import files, rng
from ktransfer.config import nearest
from ktransfer.errors import UsageError, refuse_machine
from ktransfer.networks import descriptors, functions, own_modules
from ktransfer.networks.formats import hugging_face
from ktransfer.networks.zoos import TIMM, TORCHVISION, of_timm, of_torchvision, timm_of, torchvision_names
from ktransfer.training.device import constant

TRUNKS = ("alexnet", "alexnet_bn", "vgg16", "vgg16_bn")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SIDES = (16, 32, 64, 128, 224, 240, 256, 384, 448)  # of images, in pixels, tried where a network does not take its own
HEAD = "head."
NAMES = "names"
"""Of the classes, in the metadata of a weight file."""
CLASSIFIER = ("fc", "bn6", "bn7")  # of AlexNet
WIDEST, LARGEST = 64.0, 2**14  # factor on the channels, side of the input: what is above is no network of anybody
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512))  # channels of VGG-16 up to conv4_3


@dataclass(frozen=True)
class Network:
    """What a network is: all that is needed to build it again and to feed it.

    `size` is the side of its input in pixels; `normalise` is "imagenet" (fixed mean and deviation), "R,G,B/R,G,B"
    (others, in 0..1) or "picture" (each image by its own, as Jigsaw++ does with tiles); `classes` 0 means the trunk
    alone; `task` is what it learned.
    """

    arch: str
    width: float = 1.0
    stride: int = 4
    size: int = 224
    classes: int = 0
    normalise: str = "imagenet"
    task: str = "random"


class AlexNet(nn.Module):
    """AlexNet of docs/papers.md: convolutions `conv1`..`conv5`, and `fc6`..`fc8` when there are classes.

    (batch, 3, size, size) float32 -> (batch, classes), or the output of pool5 when `classes` is 0. `stride` is that of
    conv1: 2 on the puzzle's tiles, 4 on whole images.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        batch_norm = network.arch.endswith("_bn")
        c1, c2, c3, c5 = (scaled(channels, network.width) for channels in (96, 256, 384, 256))
        rows = (
            ("1", nn.Conv2d(3, c1, 11, network.stride), True),
            ("2", nn.Conv2d(c1, c2, 5, padding=2, groups=2), True),
            ("3", nn.Conv2d(c2, c3, 3, padding=1), False),
            ("4", nn.Conv2d(c3, c3, 3, padding=1, groups=2), False),
            ("5", nn.Conv2d(c3, c5, 3, padding=1, groups=2), False),
        )
        self.trunk: list[str] = []
        for number, convolution, pooled in rows:
            self._add(f"conv{number}", convolution)
            if batch_norm:
                self._add(f"bn{number}", nn.BatchNorm2d(convolution.out_channels))
            self._add(f"relu{number}", nn.ReLU(inplace=True))
            if pooled:
                self._add(f"pool{number}", nn.MaxPool2d(3, 2, ceil_mode=True))
                if not batch_norm:
                    self._add(f"norm{number}", nn.LocalResponseNorm(5))
        self._add("pool5", nn.MaxPool2d(3, 2, ceil_mode=True))
        if network.classes:
            # Smaller images than 227 leave less than 6x6 after pool5; the head takes what is there.
            with torch.no_grad():
                side = self.eval().maps(torch.zeros(1, 3, network.size, network.size)).shape[-1]
            fc6, fc7 = (scaled(4096, network.width) for _ in range(2))
            self.pool6 = nn.AdaptiveAvgPool2d(min(side, 6))
            self.fc6 = nn.Linear(c5 * min(side, 6) ** 2, fc6)
            self.fc7 = nn.Linear(fc6, fc7)
            self.fc8 = nn.Linear(fc7, network.classes)
            self.bn6: nn.Module = nn.BatchNorm1d(fc6) if batch_norm else nn.Identity()
            self.bn7: nn.Module = nn.BatchNorm1d(fc7) if batch_norm else nn.Identity()
        self.classes = network.classes
        self.train()

    def _add(self, name: str, module: nn.Module) -> None:
        self.add_module(name, module)
        self.trunk.append(name)

    def maps(self, x: Tensor) -> Tensor:
        """(batch, 3, h, w) -> (batch, channels, h', w') after pool5."""
        for name in self.trunk:
            if name.startswith("pool") and x.shape[-1] == 1:  # the smallest tiles have nothing left to pool
                continue
            x = self.get_submodule(name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or the maps of the trunk when there are no classes."""
        x = self.maps(x)
        if not self.classes:
            return x
        x = self.pool6(x).flatten(1)
        x = nn.functional.dropout(self.bn6(self.fc6(x)).relu(), 0.5, self.training)
        x = nn.functional.dropout(self.bn7(self.fc7(x)).relu(), 0.5, self.training)
        logits: Tensor = self.fc8(x)
        return logits


class VGGTrunk(nn.Module):
    """The convolutions of VGG-16 up to conv4_3, with torchvision's names (`features.0` is conv1_1).

    Block 5 is left out: the pretext head and the clustering both read conv4 (docs/papers.md).
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        before = 3
        for block in BLOCKS:
            for channels in (scaled(channels, network.width) for channels in block):
                modules.append(nn.Conv2d(before, channels, 3, padding=1))
                modules += [nn.BatchNorm2d(channels)] if network.arch.endswith("_bn") else []
                modules.append(nn.ReLU(inplace=True))
                before = channels
            modules.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*modules[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, h, w) -> (batch, 512 * width, h / 8, w / 8): conv4_3 after its ReLU."""
        maps: Tensor = self.features(x)
        return maps


def scaled(channels: int, width: float) -> int:
    """Channels times width, a multiple of 8, at least 8."""
    return max(8, round(channels * width / 8) * 8)


def trunk(network: Network) -> Network:
    """The network without the part whose weights depend on the side of its input: AlexNet without its classifier."""
    return replace(network, classes=0) if network.arch in TRUNKS[:2] else network


@contextmanager
def fitting(network: Network) -> Iterator[None]:
    """Turn a complaint about the size of an input into a line for people (UsageError) that says what helps."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        found = _side_that_fits(network)
        small = "so small" if found and found > network.size else "of this size"
        if network.arch.startswith(functions.PREFIX):
            way = "give the --size that it takes"
        elif not found:
            way = f"no other size was found to help; give another network than {network.arch}"
        elif small == "so small" and network.size < _SIDES[-1] // 2:
            way = f"give a larger --size, such as {found}"
        else:
            way = f"give --size {found}"
        raise UsageError(
            f"--size {network.size}: {network.arch} does not take images {small} ({reason}); {way}"
        ) from error


def _side_that_fits(network: Network) -> int | None:
    """A side that the network takes, larger than its own where there is one."""
    if network.arch.startswith(functions.PREFIX):
        return None
    for side in sorted(_SIDES, key=lambda side: (side <= network.size, side)):
        with suppress(Exception), torch.no_grad():  # whatever it is that it complains of
            build(replace(network, size=side), 0, "size").eval()(torch.zeros(1, 3, side, side))
            return side
    return None


def check_arch(arch: str, width: float = 1.0, trunk: bool = False, flag: str = "--arch", own: bool = False) -> None:
    """Whether `build` will know the name, which came by `flag`.

    Args:
        own: whether it may be a network of timm, or a function of one's own.

    Raises:
        UsageError: an unknown name (with the nearest valid ones), or a width where it cannot be scaled.
    """
    if own and own_modules.is_own(arch):
        own_modules.find(arch, flag)
    elif own and arch.startswith(TIMM):
        timm_of(arch)
    elif arch not in TRUNKS and (trunk or arch.removeprefix(TORCHVISION) not in torchvision_names()):
        names = TRUNKS if trunk else (*TRUNKS, *torchvision_names())
        raise UsageError(f"{flag} {arch}: no such network; {nearest(arch, names)}")
    if width != 1.0 and not trunk and arch not in TRUNKS[:2]:
        raise UsageError(f"--width {width}: only alexnet and alexnet_bn can be scaled, not {arch}; leave it at 1")


def build(network: Network, seed: int, purpose: str) -> nn.Module:
    """A network with fresh weights, a pure function of (network, seed, purpose).

    Our own networks start with fan-in (He) weights; all others with their own.
    """
    if own_modules.is_own(network.arch):
        own_modules.find(network.arch, "network")  # a file that is imported may draw numbers too
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.torch_seed(seed, purpose, 0))
        if network.arch in TRUNKS[:2]:
            return he_init(AlexNet(network), told=network.task != "features")
        if network.arch in TRUNKS and not network.classes:
            return he_init(VGGTrunk(network))
        if network.arch in descriptors.MODULES:
            return descriptors.MODULES[network.arch]()
        if network.arch.startswith(functions.PREFIX):
            return functions.Function(network.arch.removeprefix(functions.PREFIX))
        if network.arch.startswith(TIMM):
            return of_timm(network.arch, network.size, network.classes)
        if network.arch.startswith(hugging_face.PREFIX):
            return hugging_face.build(Path(network.arch.removeprefix(hugging_face.PREFIX)))
        if own_modules.is_own(network.arch):
            return own_modules.made(network.arch, network.classes or 1000)
        return of_torchvision(network.arch, network.classes or 1000, network.size)


def classifier_names(network: Network) -> frozenset[str]:
    """The weights of a module of one's own that depend on the number of outputs: its classifier; none of others."""
    if not own_modules.is_own(network.arch):
        return frozenset()
    two, three = (build(replace(network, classes=outputs), 0, "shapes").state_dict() for outputs in (2, 3))
    return frozenset(name for name, value in two.items() if name not in three or three[name].shape != value.shape)


def he_init(model: nn.Module, told: bool = True) -> nn.Module:
    """Fan-in initialisation in place; fc8 starts near zero where it tells classes, so that the loss is ln(classes).

    Gaussians of deviation 0.01, as released for AlexNet, leave a VGG at chance for long (docs/papers.md).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
            if told and name.endswith("fc8"):
                nn.init.normal_(module.weight, std=0.001)
    return model


def normalise(pixels: Tensor, how: str) -> Tensor:
    """uint8 or float (batch, 3, h, w) in 0..255 -> float32, by fixed statistics or each image's own (`Network`)."""
    x = pixels.to(torch.float32)
    if how == "picture":
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        variance = x.var(dim=(1, 2, 3), keepdim=True, correction=0)
        return (x - mean) * (variance + 1e-5).rsqrt()
    mean, deviation = (constant(values, x.device).view(1, 3, 1, 1) * 255 for values in statistics(how))
    return (x - mean).div_(deviation)


def statistics(how: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the three colours in 0..1 that "imagenet" or "R,G,B/R,G,B" stand for."""
    if how == "imagenet":
        return IMAGENET
    mean, deviation = (tuple(float(number) for number in part.split(",")) for part in how.split("/"))
    return mean, deviation


def statistics_name(mean: Sequence[float], deviation: Sequence[float]) -> str:
    """The reverse of `statistics`."""
    if (tuple(mean), tuple(deviation)) == IMAGENET:
        return "imagenet"
    return "/".join(",".join(repr(float(number)) for number in part) for part in (mean, deviation))


def save(path: Path, state: Mapping[str, Tensor], network: Network, names: Sequence[str] = ()) -> None:
    """Write weights (without wrapper prefixes) with the description of the network as metadata.

    Args:
        names: of the classes, where they have any.
    """
    files.write_bytes(path, content(state, network, names))


def content(state: Mapping[str, Tensor], network: Network, names: Sequence[str] = ()) -> bytes:
    """The bytes of the file that `save` writes."""
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    # One entry: safetensors writes several in an order that differs from run to run.
    said = asdict(network) | ({NAMES: list(names)} if names else {})
    return serialise(dict(state), {"network": json.dumps(said)})


def stated(found: Mapping[str, Any]) -> Network:
    """The network that a weight file says it holds; what it says is not trusted.

    Raises:
        KeyError, TypeError, ValueError: it is none that has weights of its own. A name of a Python function or of a
            folder would run or read what the writer of the file chose.
    """
    network = Network(**found)
    for name, kind in {one.name: type(one.default) for one in fields(Network)}.items():
        value = getattr(network, name)
        if type(value) is not (str if name == "arch" else kind) and not (kind is float and type(value) is int):
            raise TypeError(f"{name} is {value!r}")
    if network.arch.startswith((functions.PREFIX, hugging_face.PREFIX)):
        raise ValueError(f"{network.arch} has no weights in a file")
    if not (0 < network.width <= WIDEST and 1 <= network.stride <= 16 and 1 <= network.size <= LARGEST):
        raise ValueError(f"width {network.width}, stride {network.stride}, size {network.size}")
    if network.classes < 0:
        raise ValueError(f"{network.classes} classes")
    if network.normalise != "picture":
        mean, deviation = statistics(network.normalise)
        if not len(mean) == len(deviation) == 3:
            raise ValueError(f"normalise is {network.normalise!r}")
    return network


def describe(path: Path) -> Network:
    """What a weight file of ours holds.

    Raises:
        UsageError: missing, not safetensors, or not written by ktransfer.
    """
    return _described(path)[0]


def class_names(path: Path) -> tuple[str, ...]:
    """The names of the classes that a weight file of ours tells, none where it has none.

    Raises:
        UsageError: as `describe`.
    """
    return _described(path)[1]


def _described(path: Path) -> tuple[Network, tuple[str, ...]]:
    try:
        with files.in_unicode(path) as place, safe_open(place, framework="pt") as handle:
            found = handle.metadata() or {}
    except (OSError, SafetensorError) as error:
        refuse_machine(path, error)
        raise UsageError(f"{path}: not a weight file of ktransfer ({error}); give a model.safetensors") from error
    try:
        said = json.loads(found["network"])
        names = tuple(map(str, said.pop(NAMES, ())))
        return stated(said), names
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: does not say which network it is; give a model.safetensors of ktransfer") from error


def load(path: Path, network: Network) -> nn.Module:
    """The network of a weight file, rebuilt as `network` says (its stride may differ); a puzzle's head is left out, and
    AlexNet's classifier where `network` has no classes (`trunk`).

    Raises:
        UsageError: weights are missing, unexpected or of another shape.
    """
    unused: tuple[str, ...] = (HEAD,) if network.arch in TRUNKS else ()
    if network.arch in TRUNKS[:2] and not network.classes:
        unused += CLASSIFIER
    with files.in_unicode(path) as place, safe_open(place, framework="pt") as handle:
        state = {name: handle.get_tensor(name) for name in handle.keys() if not name.startswith(unused)}  # noqa: SIM118
    try:
        _refuse_larger(network, sum(tensor.numel() for tensor in state.values()))
        model = build(network, 0, "load")
        model.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: its weights do not fit {network.arch}: {' '.join(str(error).split())}") from error
    return model


def _refuse_larger(network: Network, held: int) -> None:
    """ValueError where the network has more weights than the `held` ones of its file, before memory is taken for it."""
    if network.classes > held:
        raise ValueError(f"{network.classes} classes, and {held} numbers in the file")
    if network.arch in TRUNKS[:2]:
        with torch.device("meta"):
            wanted = sum(weight.numel() for weight in AlexNet(network).parameters())
        if wanted > held:
            raise ValueError(f"it has {wanted} weights, and the file {held} numbers")
