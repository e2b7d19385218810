"""JPEGs by torchvision: faster than by Pillow, with the very same pixels.

torch is imported late: the processes of `ktransfer pack` do without it.
"""

import io
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ktransfer.images import decoding

if TYPE_CHECKING:
    from torch import Tensor

_TRIAL = (45, 67)  # sides of the image on which the decoders are compared: no multiple of a block of 16


def decode(data: bytes) -> NDArray[np.uint8]:
    """What `decoding.decode` makes of a whole JPEG as `ktransfer pack` writes it: the same pixels, sooner.

    Both libraries decode with libjpeg-turbo, whose output is fixed to the bit. Where torchvision was built differently,
    and for what it does not take, Pillow does it.

    Args:
        data: the file: RGB, upright.

    Returns:
        (height, width, 3) uint8.

    Raises:
        BrokenImage: see `decoding.decode`.
    """
    if decoders_agree():
        try:
            found = _decoded(data)
        except RuntimeError:
            return decoding.decode(data)  # says what is wrong with it
        if len(found) == 3:
            pixels: NDArray[np.uint8] = found.permute(1, 2, 0).numpy()
            return pixels
    return decoding.decode(data)


@cache
def decoders_agree() -> bool:
    """Whether torchvision's decoder is there and gives Pillow's pixels, tried on one image with reduced colours."""
    noise = np.random.default_rng(0).integers(0, 256, (*_TRIAL, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    try:
        found = _decoded(buffer.getvalue())
    except (ImportError, OSError, RuntimeError, AttributeError):  # torchvision was built without it
        return False
    return np.array_equal(found.permute(1, 2, 0).numpy(), decoding.decode(buffer.getvalue()))


def _decoded(data: bytes) -> "Tensor":
    import torch
    from torchvision.io import ImageReadMode

    # The operator itself: `torchvision.io.decode_jpeg` warns at each call that it will go one day.
    decoder = torch.ops.image.decode_jpeg
    found: Tensor = decoder(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED.value, False)
    return found
