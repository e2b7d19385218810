"""How the authors of a Hugging Face folder prepare images, and in what that differs from how it is done here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ktransfer.errors import UsageError
from ktransfer.networks.formats.hugging_face import PROCESSORS, read_json

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_WHOLE = 384  # from this side on, the preprocessing of ConvNeXt crops nothing


class Preprocessing(NamedTuple):
    """What becomes of an image.

    Attributes:
        size: side in pixels that the network is fed with.
        mean, deviation: of the three colours, in 0..1; None where the folder does not say.
        line: what differs from ours, for people; None where nothing does.
    """

    size: int
    mean: tuple[float, ...] | None
    deviation: tuple[float, ...] | None
    line: str | None


def read(folder: Path, size: int) -> Preprocessing:
    """The preprocessing that a folder states.

    Args:
        folder: of Hugging Face.
        size: side where it states none.

    Raises:
        UsageError: the file that states it is damaged.
    """
    for name in PROCESSORS:
        if (folder / name).is_file():
            states = read_json(folder / name)
            states = states.get("image_processor", states)
            try:
                return _stated(folder, states, size)
            except (AttributeError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
                raise UsageError(f"{folder / name}: not understood ({error!r}); download it again") from error
    line = f"{folder}: without {PROCESSORS[0]}; images are normalised by ImageNet's statistics"
    return Preprocessing(size, None, None, line)


def _stated(folder: Path, states: Mapping[str, Any], size: int) -> Preprocessing:
    side, differences = _geometry(states, size)
    resample = states.get("resample", 2)
    if states.get("do_resize", True) and resample != 2:
        differences.append(f"resized by {_FILTERS.get(resample, resample)}")
    mean, deviation = states.get("image_mean"), states.get("image_std")
    if not states.get("do_normalize", True):
        mean, deviation = (0.0,) * 3, (1.0,) * 3
    elif mean is None or deviation is None:
        mean = deviation = None
        differences.append("normalised by statistics that it does not state, and here by ImageNet's")
    # They scale pixels of 0..255 by a factor, and then subtract and divide; the mean and deviation of 0..1 do the same.
    factor = 255 * float(states.get("rescale_factor", 1 / 255)) if states.get("do_rescale", True) else 255.0
    if mean is not None and deviation is not None:
        scale = 1 if abs(factor - 1) < 1e-6 else factor
        mean, deviation = (tuple(float(number) / scale for number in part) for part in (mean, deviation))
        if len(mean) != 3 or len(deviation) != 3 or 0 in deviation:
            raise ValueError("image_mean and image_std must have three numbers, and no deviation may be 0")
    line = f"its authors' images are {', '.join(differences)}; here: short side {side}, centre square, bilinear"
    return Preprocessing(side, mean, deviation, f"{folder}: {line}" if differences else None)


def _geometry(states: Mapping[str, Any], size: int) -> tuple[int, list[str]]:
    """The side, and how their cut differs from the short side and the centre square."""
    resized = _sides(states["size"]) if states.get("size") and states.get("do_resize", True) else None
    cropped = _sides(states["crop_size"]) if states.get("crop_size") and states.get("do_center_crop") else None
    percent = states.get("crop_pct")  # of ConvNeXt
    if percent and resized:
        side = resized[0]
        if side >= _WHOLE:
            return side, [f"squeezed to {side} x {side}"]
        short = int(side / float(percent))
        return side, [f"cut from a short side of {short}"] if short != side else []
    if resized is None:
        side = cropped[0] if cropped else size
        return side, ["not resized"] if not states.get("do_resize", True) else []
    side = cropped[0] if cropped else resized[0]
    if len(resized) == 2:
        where = f" and cut to {side} x {side}" if cropped and cropped[0] != resized[0] else ""
        return side, [f"squeezed to {resized[0]} x {resized[1]}{where}"]
    if cropped is None:
        return side, [f"not cut to a square (short side {side})"]
    return side, [f"cut from a short side of {resized[0]}"] if resized[0] != side else []


def _sides(given: Any) -> tuple[int, ...]:
    """One number, the short side, or height and width; old files state a bare number."""
    if not isinstance(given, Mapping):
        return (int(given),)
    if given.get("shortest_edge"):
        return (int(given["shortest_edge"]),)
    return int(given["height"]), int(given["width"])


def differences(name: str, size: int, short: int | None, interpolation: str | None) -> str | None:
    """A line on how the authors of a network of torchvision or timm cut images, where that differs from ours.

    Args:
        name: of the network.
        size: side in pixels that it is fed with.
        short: short side before the centre square is cut, None where it is not stated.
        interpolation: how they resize, such as "bicubic".
    """
    found = [f"cut from a short side of {short}"] if short and short != size else []
    found += [f"resized by {interpolation}"] if interpolation and interpolation != "bilinear" else []
    if not found:
        return None
    return f"{name}: its authors' images are {', '.join(found)}; here: short side {size}, centre square, bilinear"
