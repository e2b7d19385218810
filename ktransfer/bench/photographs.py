"""Generated photographs, for measurements: noise whose JPEGs are as large as those of ImageNet."""

from pathlib import Path

import numpy as np
from PIL import Image

from ktransfer.progress import track

FALL = 1.3
"""Power of the frequency by which amplitudes fall. With QUALITY, 500 x 375 pixels take 114 kB, and at short side 256
and quality 90 there are 2.7 bits a pixel. ImageNet's images have 110 kB on average, and by FFCV's documentation take
22 GB at 256 and quality 90, which is 2.8 bits where the long side has 256 pixels and the short one 192."""
QUALITY = 96


def photograph(seed: int, height: int = 375, width: int = 500) -> Image.Image:
    """One of them, a function of its arguments."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    fall = np.maximum(frequency, 1 / width) ** -FALL
    common, own = random.standard_normal((2, 3, height, width))
    waves = np.fft.irfft2(np.fft.rfft2(common[:1] + 0.3 * own) * fall, (height, width))
    waves = (waves - waves.mean()) / waves.std()
    return Image.fromarray(np.clip(128 + 50 * waves, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def write_photographs(folder: Path, count: int) -> Path:
    """`count` JPEGs in a folder; those that are there stay."""
    folder.mkdir(exist_ok=True)
    for number in track(range(count), count, "generate images"):
        path = folder / f"{number:05d}.jpg"
        if not path.exists():
            photograph(number).save(path, quality=QUALITY)
    return folder
