"""Detectors and segmenters as files: safetensors that say themselves what they hold."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import nn

from ktransfer import files
from ktransfer.detection.frames import EXIF, OBEY
from ktransfer.errors import UsageError, refuse_machine
from ktransfer.networks import Network
from ktransfer.networks.network import stated

if TYPE_CHECKING:
    from ktransfer.detection.detectors import Settings  # imports torchvision, as all that makes a detector does

LARGEST = 100_000  # of whatever number a file states: no memory is asked for on its word


@dataclass(frozen=True)
class Described:
    """What a detector or segmenter is: its trunk's network, the pyramid on it, the heads, and the classes it predicts.

    `settings.kind` is a key of `segmentation.HEADS` for a segmenter; of the settings only `norm` says more of it.
    """

    network: Network
    neck: str
    settings: "Settings"
    classes: tuple[str, ...]
    size: int
    channels: int = 256
    """Of the pyramid and the heads."""
    exif: str = OBEY
    """How it takes images, see frames.py."""

    def as_dict(self) -> dict[str, Any]:
        """What a file says of it, which `described` reads."""
        found = asdict(self)
        if self.exif == OBEY:  # as all did before there was another way: their files stay the same
            del found["exif"]
        return found


def make(
    described: Described, seed: int, weights: Path | None = None, foreign: bool = False, filled_later: bool = False
) -> nn.Module:
    """A network of that kind: its trunk with the weights of a file (see `trunks.build`), the rest by the seed."""
    from ktransfer.detection import detectors, segmentation, trunks

    network, norm = described.network, described.settings.norm
    trunk = trunks.build(network, weights, described.neck, norm, seed, described.channels, foreign, filled_later)
    if described.settings.kind in segmentation.HEADS:
        return segmentation.build(trunk, len(described.classes), norm, seed, described.settings.kind)
    return detectors.build(trunk, len(described.classes), described.size, described.settings, seed)


def save(path: Path, model: nn.Module, described: Described) -> None:
    """Write the weights of a detector and what it is."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # One entry: safetensors writes several in an order that differs from run to run.
    files.write_bytes(path, serialise(state, {"detector": json.dumps(described.as_dict())}))


def describe(path: Path) -> Described:
    """What a file of `save` holds.

    Raises:
        UsageError: missing, not safetensors, or no detector of ktransfer.
    """
    try:
        with files.in_unicode(path) as place, safe_open(place, framework="pt") as handle:
            return described(json.loads((handle.metadata() or {})["detector"]))
    except (OSError, SafetensorError) as error:
        refuse_machine(path, error)
        raise UsageError(f"{path}: not a weight file of ktransfer ({error}); give the model.safetensors") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: holds no detector; give the model.safetensors of a selftrain step") from error


def described(found: dict[str, Any]) -> Described:
    """What `Described.as_dict` says; KeyError, TypeError or ValueError where it says something else."""
    from ktransfer.detection.detectors import Settings

    network, settings, exif = stated(found["network"]), Settings(**found["settings"]), found.get("exif", OBEY)
    if exif not in EXIF:
        raise ValueError(f"exif is {exif}")
    numbers = {**asdict(settings), "size": found["size"], "channels": found["channels"]}
    for name, value in numbers.items():
        text = isinstance(getattr(Settings, name, 0), str)
        if text != isinstance(value, str) or not (text or 0 <= value <= LARGEST):
            raise ValueError(f"{name} is {value}")
    classes = tuple(map(str, found["classes"]))
    return Described(network, found["neck"], settings, classes, found["size"], found["channels"], exif)


def load(path: Path) -> tuple[nn.Module, Described]:
    """The detector of a file, on the CPU.

    Raises:
        UsageError: as `describe`, or weights that do not fit.
    """
    made = describe(path)
    model = make(made, 0, filled_later=True)
    with files.in_unicode(path) as place, safe_open(place, framework="pt") as handle:
        state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"{path}: its weights do not fit: {' '.join(str(error).split())}") from error
    return model, made
