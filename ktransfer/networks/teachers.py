"""What `--teacher` names: weights of ours, of torchvision, timm or transformers, a checkpoint made elsewhere, or HOG.

Nothing is ever downloaded. How images are normalised for a teacher is in `Network.normalise`: each by its own mean and
deviation for pretext tasks of ours; ImageNet's for checkpoints made elsewhere, unless torchvision, timm or a folder of
Hugging Face state others for the very weights; 0..1 for HOG and pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ktransfer import networks
from ktransfer.errors import UsageError
from ktransfer.networks import Network, caches, checkpoints, descriptors, functions, own_modules, published
from ktransfer.networks.formats import hugging_face, preprocessing
from ktransfer.networks.formats.hugging_face import HuggingFace
from ktransfer.networks.functions import Function
from ktransfer.networks.layer_maps import holds_class_token
from ktransfer.networks.published import POOLED
from ktransfer.networks.zoos import TIMM, TORCHVISION, near, timm_of, torchvision_names
from ktransfer.progress import say_once
from ktransfer.run import input_hash
from ktransfer.training.device import autocast
from ktransfer.training.options import MachineOptions

KINDS = (
    "a model.safetensors of ktransfer, a checkpoint with --arch, torchvision:NAME, timm:NAME, a folder of Hugging "
    "Face, efficientnet-lite0, hog, pixels or pkg.module:function"
)
SIZE = 224
SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class Teacher:
    """A network and the file or folder of its weights, None where it has none (HOG, pixels).

    `foreign`: not of ktransfer.

    `layer` is what is read where no layer is asked for; None: the last one that has maps.
    """

    network: Network
    weights: Path | None
    foreign: bool = False
    layer: str | None = None

    @property
    def pooled(self) -> bool:
        """Whether its maps are pooled to a grid."""
        return self.network.arch not in descriptors.MODULES


def find(given: str, arch: str | None, weights: str | None, size: int) -> Teacher:
    """The teacher that is named, its weights not yet read.

    Args:
        given: `--teacher`.
        arch: architecture of a checkpoint made elsewhere.
        weights: for `torchvision:NAME` a path or an entry of its weights, for `timm:NAME` a path.
        size: side of the images in pixels, 0 for the teacher's own.

    Raises:
        UsageError: no such teacher, weights that are not here, options that it does not have.
    """
    library = given.startswith((TORCHVISION, TIMM))
    own = not library and functions.is_name(given)
    named = library or own or given in descriptors.MODULES or given in published.NAMES
    if weights and not library:
        raise UsageError(f"--weights {weights}: only for --teacher torchvision:NAME or timm:NAME; leave it out")
    if arch and named:
        raise UsageError(f"--arch {arch}: --teacher {given} already names the network; leave --arch out")
    if given in descriptors.MODULES:
        return _sized(Teacher(Network(given, size=descriptors.SIZES[given], normalise=descriptors.UNIT), None), size)
    if given in published.NAMES:
        network = published.network(given)
        timm_of(network.arch)
        return _sized(Teacher(network, published.weights(given), foreign=True, layer=POOLED), size)
    if given.startswith(TORCHVISION):
        return _sized(_of_torchvision(given, weights), size)
    if given.startswith(TIMM):
        return _sized(Teacher(_of_timm(given), _timm_weights(given, weights), foreign=True), size)
    if own:
        own_network = Network(f"{functions.PREFIX}{given}", size=SIZE, normalise=descriptors.UNIT)
        return _sized(Teacher(own_network, None, layer=POOLED), size)
    path = _cached(given)
    if path.is_dir():
        if arch:
            raise UsageError(
                f"--arch {arch}: only extract --teacher takes a folder such as {given}, which says which network it "
                "is; leave --arch out"
            )
        return _sized(_of_folder(path), size)
    if not path.is_file():
        raise UsageError(f"--teacher {given}: no such file; give {KINDS}")
    if arch is None:
        return _sized(Teacher(_described(path), path), size)
    if path.suffix == SAFETENSORS and _says_what_it_is(path):
        raise UsageError(
            f"--arch {arch}: {path} is a file of ktransfer, which says which network it is; leave --arch out"
        )
    if arch.startswith(TIMM):
        return _sized(Teacher(_of_timm(arch), path, foreign=True), size)
    if own_modules.is_own(arch):
        raise UsageError(
            f"--arch {arch}: a checkpoint is read into a network by name; give --teacher pkg.module:function, which "
            "loads your own and calls it"
        )
    networks.check_arch(arch)
    return _sized(Teacher(Network(arch, size=SIZE), path, foreign=True), size)


def identity(teacher: Teacher) -> str:
    """Hex SHA-256 of the weights, or of the name and version of what has none."""
    if teacher.network.arch.startswith(functions.PREFIX):
        return functions.identity(teacher.network.arch.removeprefix(functions.PREFIX))
    if teacher.weights is None:
        return sha256(f"ktransfer {teacher.network.arch} 1".encode()).hexdigest()
    if teacher.weights.is_dir():
        return hugging_face.identity(teacher.weights)
    return input_hash(teacher.weights)


def load(teacher: Teacher) -> nn.Module:
    """The network with its weights, in evaluation mode; of a foreign checkpoint a line says what matched.

    Raises:
        UsageError: the weights cannot be read or do not fit.
    """
    if teacher.weights is None:
        return networks.build(teacher.network, 0, "load").eval()
    if not teacher.foreign:
        return networks.load(teacher.weights, teacher.network).eval()
    if teacher.weights.is_dir():
        read, line = hugging_face.load(teacher.weights)
        say_once(line)
        return read.eval()
    model: Any = networks.build(teacher.network, 0, "load")
    found = checkpoints.fit(teacher.weights, model, teacher.network.arch)
    say_once(found.line)
    if found.adapt:
        found.adapt(model)
    model.load_state_dict(found.state, strict=False)
    if hasattr(model, "transform_input"):
        # torchvision's googlenet and inception_v3 were trained by other statistics, and turn ImageNet's into those.
        model.transform_input = teacher.network.arch.startswith(TORCHVISION)
    loaded: nn.Module = model.eval()
    return loaded


def shapes(network: Network, model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Layer -> (channels, height, width) of its maps; for a transformer those of its patches.

    Raises:
        UsageError: the images are too small.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    x = torch.zeros(1, 3, network.size, network.size, device=device)
    with networks.fitting(network), torch.no_grad():
        paths = networks.layers(network, model)
        maps = networks.feature_maps(model, paths, x)
        if _pools(network, model):
            maps[POOLED] = _pooled(model, x)
    return {name: (found.shape[1], found.shape[2], found.shape[3]) for name, found in maps.items()}


def last_layer(shapes: dict[str, tuple[int, int, int]]) -> str:
    """The last layer that has maps."""
    return [name for name in shapes if name != POOLED][-1]


def listing(network: Network, model: nn.Module) -> str:
    """The layers for people, one a line."""
    rows = [f"{name:<12} {c} x {h} x {w}" for name, (c, h, w) in shapes(network, model).items()]
    first = f"{network.arch}, images of {network.size} x {network.size}: layer, channels x height x width"
    if networks.tokens_before(model) is not None:
        names = "cls and mean" if networks.has_class_token(model) else "mean"
        first += f" of --token patch ({names}: one number a channel)"
    return "\n".join([first, *rows])


def choose_token(model: nn.Module, network: Network, token: str | None, layer: str) -> str | None:
    """The token to read of a layer: the class token where it has one, unless another is asked for.

    Raises:
        UsageError: a network without tokens, or without a class token in that layer.
    """
    arch = network.arch
    if networks.tokens_before(model) is None:
        if token:
            raise UsageError(f"--token {token}: {arch} is not a transformer with tokens; leave --token out")
        return None
    classed = networks.has_class_token(model)
    if token == "cls" and not classed:
        raise UsageError(f"--token cls: {arch} has no class token; give mean or patch")
    if layer != POOLED and token in (None, "cls"):
        classed = holds_class_token(network, model, networks.layers(network, model)[layer])
        if token and not classed:
            raise UsageError(
                f"--token cls: {arch} has no class token yet in {layer}; give mean or patch, or a later --layer"
            )
    return token or ("cls" if classed else "mean")


def reader(model: nn.Module, network: Network, layer: str, token: str | None) -> Callable[[Tensor], Tensor]:
    """(batch, 3, size, size) uint8 -> the maps of a layer, (batch, channels, h, w), with h = w = 1 of one token."""
    if layer == POOLED:
        return lambda pixels: _pooled(model, networks.normalise(pixels, network.normalise))
    path = networks.layers(network, model)[layer]

    def read(pixels: Tensor) -> Tensor:
        x = networks.normalise(pixels, network.normalise)
        return networks.feature_maps(model, {"read": path}, x, token or "patch")["read"]

    return read


def rows_reader(
    teacher: Teacher,
    layer: str,
    token: str | None,
    pool: int,
    l2: bool,
    options: MachineOptions,
    device: torch.device,
) -> Callable[[Tensor], Tensor]:
    """(batch, 3, size, size) uint8 -> (batch, d) features on the device, d = channels * pool * pool.

    Args:
        layer, token: what is read (`reader`).
        pool: maps are max-pooled to this grid; hog and pixels are taken whole.
        l2: whether rows get length 1.
        options: their `precision` counts.
    """
    maps_of = reader(load(teacher).to(device), teacher.network, layer, token)

    @torch.no_grad()
    def compute(pixels: Tensor) -> Tensor:
        with autocast(options, device):
            maps = maps_of(pixels.to(device)).float()
            if teacher.pooled:
                maps = F.adaptive_max_pool2d(maps, min(pool, maps.shape[-1]))
            rows = maps.flatten(1)
            return F.normalize(rows) if l2 else rows

    return compute


def _pools(network: Network, model: nn.Module) -> bool:
    """Whether the network, made without its classifier, ends with the vector that a classifier would get."""
    return (network.arch.startswith(TIMM) and not network.classes) or (
        isinstance(model, HuggingFace | Function) and model.pools
    )


def _pooled(model: nn.Module, x: Tensor) -> Tensor:
    """(batch, 3, h, w) normalised -> (batch, channels, 1, 1)."""
    vectors: Tensor = model(x)
    return vectors.flatten(1)[:, :, None, None]


def _sized(teacher: Teacher, size: int) -> Teacher:
    network = networks.trunk(replace(teacher.network, size=size or teacher.network.size))
    if network.arch == "hog" and (network.size % descriptors.CELL or network.size < 2 * descriptors.CELL):
        raise UsageError(
            f"--size {network.size}: hog has cells of {descriptors.CELL} pixels; give a multiple, from 16 on"
        )
    return replace(teacher, network=network)


def _described(path: Path) -> Network:
    try:
        return networks.describe(path)
    except UsageError as error:
        raise UsageError(f"{error}, or say with --arch which network this checkpoint is") from error


def _says_what_it_is(path: Path) -> bool:
    try:
        networks.describe(path)
    except UsageError:
        return False
    return True


def _of_torchvision(given: str, weights: str | None) -> Teacher:
    from torchvision import models as zoo

    name = given.removeprefix(TORCHVISION)
    names = torchvision_names()
    if name not in names:
        raise UsageError(f"--teacher {given}: torchvision has no such network; {near(name, names)}")
    entries: Any = zoo.get_model_weights(name)
    known = (entries.DEFAULT, *entries)
    cache = caches.torch_folder()
    if weights and weights not in entries.__members__:
        path = Path(weights)
        entry = next((entry for entry in known if _file(entry) == path.name), entries.DEFAULT)
    else:
        wanted = (entries[weights],) if weights else known
        entry = next((entry for entry in wanted if (cache / _file(entry)).is_file()), wanted[0])
        path = cache / _file(entry)
    if not path.is_file():
        raise UsageError(
            f"--teacher {given}: {path} does not exist, and nothing is downloaded; download {_file(entry)} from the "
            "url of "
            f"torchvision's {entry} and put it into {cache}, or name the file with --weights"
        )
    states = entry.transforms.keywords if isinstance(entry.transforms, partial) else {}
    mean, deviation = states.get("mean"), states.get("std")
    how = networks.statistics_name(mean, deviation) if mean and deviation else "imagenet"
    network = Network(given, size=int(states.get("crop_size", SIZE)), normalise=how)
    filtered = getattr(states.get("interpolation"), "value", None)
    _say_differences(given, network.size, states.get("resize_size", 256) if states else None, filtered)
    return Teacher(network, path, foreign=True)


def _say_differences(name: str, size: int, short: int | None, interpolation: str | None) -> None:
    if line := preprocessing.differences(name, size, short, interpolation):
        say_once(line)


def _of_folder(path: Path) -> Teacher:
    folder = hugging_face.open_folder(path)
    stated = preprocessing.read(path, folder.side or SIZE)
    if stated.line:
        say_once(stated.line)
    mean, deviation = stated.mean, stated.deviation
    how = networks.statistics_name(mean, deviation) if mean and deviation else "imagenet"
    network = Network(f"{hugging_face.PREFIX}{path}", size=stated.size, normalise=how)
    return Teacher(network, path, foreign=True, layer=POOLED if folder.pools else None)


def _file(entry: Any) -> str:
    return str(entry.url).rsplit("/", 1)[-1]


def _cached(given: str) -> Path:
    """A path, or what a name stands for in a cache, which a line says."""
    path = Path(given)
    if path.exists() or not (found := caches.repository(given) or caches.file(given)):
        return path
    say_once(f"{given}: {found}")
    return found


def _timm_weights(given: str, weights: str | None) -> Path:
    """The file that is named, or in a cache what a name stands for, or without one what timm would load."""
    if weights and Path(weights).exists():
        return Path(weights)
    if weights:
        found = caches.file(weights)
    else:
        stated = timm_of(given).get_pretrained_cfg(given.removeprefix(TIMM))
        found = caches.of_timm(stated.to_dict()) if stated else None
        if found is None:
            raise UsageError(
                f"--teacher {given}: its weights are in no cache, and nothing is downloaded; download them and name "
                "the file with --weights"
            )
    if found is None:
        return Path(str(weights))
    say_once(f"{given}: its weights are {found}")
    return found


def _of_timm(arch: str) -> Network:
    timm, name = timm_of(arch), arch.removeprefix(TIMM)
    try:
        stated = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UsageError(f"{arch}: {' '.join(str(error).split())}; leave out what follows the dot") from error
    states: dict[str, Any] = stated.to_dict() if stated else {}
    mean, deviation = states.get("mean"), states.get("std")
    how = networks.statistics_name(mean, deviation) if mean and deviation else "imagenet"
    size = int(states.get("input_size", (SIZE,))[-1])
    _say_differences(arch, size, int(size / (states.get("crop_pct") or 1)), states.get("interpolation"))
    return Network(arch, size=size, normalise=how)
