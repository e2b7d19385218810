"""Sound inputs, of which hostile ones are made: the smallest files that each reader takes."""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

COCO = json.dumps(
    {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 40, "height": 43},
            {"id": 2, "file_name": "b.jpg", "width": 40, "height": 43},
        ],
        "annotations": [
            {
                **{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 12], "area": 120.0, "iscrowd": 0},
                **{"segmentation": [[2, 3, 12, 3, 12, 15, 2, 15]], "score": 0.9},
            },
            {
                **{"id": 2, "image_id": 2, "category_id": 2, "bbox": [5.5, 1, 20, 20], "area": 300, "iscrowd": 1},
                **{"segmentation": {"size": [43, 40], "counts": [100, 20, 1600]}, "score": 0.5},
            },
        ],
        "categories": [{"id": 1, "name": "x", "supercategory": "s"}, {"id": 2, "name": "y"}],
    }
).encode()
VOC = b"""<annotation><folder>VOC2007</folder><filename>a.jpg</filename>
<size><width>40</width><height>43</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult>
<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>15</ymax></bndbox></object>
<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>43</ymax></bndbox></object>
</annotation>"""
RECORD = json.dumps(
    {
        "pretext": {
            **{"state": "running", "config": {"data": "scenes:", "seed": 0}, "inputs": {"data": "1"}, "outputs": {}},
            **{"writes": ["model.safetensors"], "versions": {}, "device": "cpu", "started": "2026-01-01T00:00:00+0000"},
            **{"seconds": 1.5, "error": None},
        }
    }
).encode()


def picture(kind: str, side: int = 9, mode: str = "RGB", **how: Any) -> bytes:
    """A small image as a file of that kind."""
    from PIL import Image

    made = io.BytesIO()
    Image.radial_gradient("L").resize((side, side + 3)).convert(mode).save(made, kind, **how)
    return made.getvalue()


def pictures() -> list[bytes]:
    """One of each kind that is read."""
    found = [picture(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")]
    found += [picture("PNG", mode=mode) for mode in ("1", "L", "LA", "RGBA", "P", "I;16")]
    found += [picture("TIFF", mode=mode) for mode in ("F", "I", "CMYK", "L")]
    found += [picture("JPEG", mode="CMYK"), picture("JPEG", progressive=True), picture("WEBP", lossless=True)]
    found += [picture("TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_deflate", "packbits")]
    return found


def _written(write: Any, *names: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return [(Path(folder) / name).read_bytes() for name in names]


def features() -> list[bytes]:
    """Three rows of four numbers."""
    from ktransfer.artifacts.features import create_or_resume

    said = {"teacher": "t", "layer": "l", "pooling": "p", "transform": "t", "fingerprint": "f"}

    def write(folder: Path) -> None:
        writer = create_or_resume(folder / "f.h5", ["a", "b", "c"], np.zeros(3, np.int32), 4, "float32", said)
        writer.write(0, np.arange(12, dtype=np.float32).reshape(3, 4), np.array([True, True, False]))
        writer.finish()

    return _written(write, "f.h5")


def centroids() -> list[bytes]:
    """Two centroids of four numbers, without and with a PCA."""
    import h5py

    from ktransfer.artifacts import centroids as module

    found = []
    for columns in (0, 3):
        image = io.BytesIO()
        with h5py.File(image, "w") as file:
            file.attrs["schema"], file.attrs["normalise"] = module.SCHEMA, True
            for name in module.SOURCE:
                file.attrs[name] = "x"
            file["centroids"] = np.ones((2, columns or 4), np.float32)
            if columns:
                parts = {"mean": (4,), "components": (4, columns), "explained": (columns,), "scale": (columns,)}
                for name, shape in parts.items():
                    file[f"pca/{name}"] = np.ones(shape, np.float64 if name == "explained" else np.float32)
        found.append(image.getvalue())
    return found


def pack() -> list[bytes]:
    """Packs of three images, one of them broken, of JPEGs and of pixels."""
    from ktransfer.data.pack import pack as make

    def write(folder: Path) -> None:
        for name in "abc":
            (folder / "images" / name).mkdir(parents=True)
            data = picture("PNG", 12) if name != "b" else b"no image"
            (folder / "images" / name / "1.png").write_bytes(data)
        for raw in (False, True):
            make(str(folder / "images"), folder / f"{raw}.h5", 8, raw, None, 1, 1.0)

    return _written(write, "False.h5", "True.h5")


def _labels(name: str) -> list[bytes]:
    from ktransfer.artifacts.labels import write_labels

    numbers, far = np.array([0, 1, -1], np.int32), np.array([0.5, 0.25, 0], np.float32)
    return _written(lambda folder: write_labels(folder, ["a", "b", "c"], numbers, far, 2, "c", "f"), name)


def labels_h5() -> list[bytes]:
    """Three labels."""
    return _labels("labels.h5")


def labels_bin() -> list[bytes]:
    """The same in the authors' layout."""
    return _labels("labels.bin")


def npy() -> list[bytes]:
    """Three rows of four numbers, and an object that would have to be unpickled."""
    found = []
    for array in (np.ones((3, 4), np.float32), np.ones((3, 4), ">f8"), np.array([print, None], dtype=object)):
        made = io.BytesIO()
        np.save(made, array)
        found.append(made.getvalue())
    return found


def npz() -> list[bytes]:
    """The same with keys."""
    made = io.BytesIO()
    np.savez(made, features=np.ones((3, 4), np.float32), keys=np.array(["a", "b", "c"]))
    return [made.getvalue()]


def permutations() -> list[bytes]:
    """Six permutations."""
    from ktransfer.pretext.permutations import generate, to_bytes

    return [to_bytes(generate(6))]


def network() -> list[bytes]:
    """A small AlexNet that says what it is."""
    from ktransfer import networks
    from ktransfer.networks import Network

    small = Network("alexnet_bn", 0.05, 2, 40, 2, "imagenet")
    state = networks.build(small, 1, "test").state_dict()
    return _written(lambda folder: networks.save(folder / "m", state, small), "m")


class Runs:
    """What a pickle of bad intent holds: it writes a file where it is called."""

    def __reduce__(self) -> Any:
        """Called when it is unpickled."""
        import os

        return os.system, ("touch /tmp/ktransfer-was-here",)


def checkpoints() -> list[bytes]:
    """State dicts in torch's two formats, one that runs a program, one of TorchScript."""
    import torch
    from torch import nn

    small = {"state_dict": {"conv1.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}, "epoch": 3}
    found = []
    for held, new in (
        (small, True),
        (small, False),
        (small | {"args": Runs()}, True),
        ({"model": nn.Linear(2, 2)}, True),
    ):
        made = io.BytesIO()
        torch.save(held, made, _use_new_zipfile_serialization=new)
        found.append(made.getvalue())
    return found


def resumed() -> list[bytes]:
    """Our own checkpoint of a training."""
    import torch
    from torch import nn

    model = nn.Linear(2, 2)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    made = io.BytesIO()
    torch.save({"step": 2, "model": model.state_dict(), "optimiser": optimiser.state_dict()}, made)
    return [made.getvalue()]


def recipes() -> list[bytes]:
    """Of a line, and of a study."""
    return [
        b'[pretext]\nepochs = 2\nlr = 0.1\n[retrain]\narch = "alexnet"\n[cluster]\nnormalise = true\n',
        b'[selftrain]\nlabelled = "scenes:"\n[grid]\nfraction = [0.5, 1.0]\naugment = ["S1", "S2"]\n'
        b'[names]\nS1 = "weak"\n',
    ]


def progress() -> list[bytes]:
    """What a line at work writes."""
    from ktransfer import progress as module
    from ktransfer.run import PROGRESS

    def write(folder: Path) -> None:
        with module.kept_in(folder / PROGRESS, ["pretext", "cluster"]):
            text = (folder / PROGRESS).read_bytes() if (folder / PROGRESS).exists() else b"{}"
            (folder / "kept").write_bytes(text)

    return _written(write, "kept")


def hugging_face() -> list[bytes]:
    """Configurations of two kinds of networks."""
    return [
        json.dumps({"model_type": "resnet", "hidden_sizes": [4, 8], "depths": [1, 1], "embedding_size": 4}).encode(),
        json.dumps({"model_type": "clip", "vision_config": {"hidden_size": 8, "image_size": 32}}).encode(),
    ]


def preprocessor() -> list[bytes]:
    """How images become input."""
    said = {
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "do_resize": True,
    }
    more = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    return [json.dumps(said | more).encode()]


def index() -> list[bytes]:
    """Of a folder in which nothing is."""
    from ktransfer.data import folders

    text = json.dumps(folders.Index({"": folders.Listing("0", ["1.jpg"], [], [], 0)}, {"1.jpg": "0"}))
    return [f"{folders._check(text)}\n{text}".encode()]
