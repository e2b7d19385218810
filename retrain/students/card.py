"""The card beside an exported network: what it is, what it learned, how good it is, how to run it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ktransfer import networks
from ktransfer.networks import Network
from ktransfer.run import read_record

from .classifier import Classifier
from .loading import are_names, record_of

SHOWN = 100
"""Names of classes that are listed."""
WHAT = {
    "classes": "classes",
    "pseudo-labels": "clusters, whose number is the label",
    "features": "numbers of its teacher's features, by their direction alone",
    "random": "outputs of random weights, which have learned nothing",
    "jigsawpp": "permutations of the tiles of an image, some of them of other images",
    "jigsaw": "permutations of the tiles of an image",
    "rotation": "turns of an image",
    "context": "places of a patch beside another",
}
"""What the outputs of a task are; in the title up to the comma."""
FILL_IN = "*to be filled in: that of the images and of the teacher may bind you*"


class Exported(NamedTuple):
    """What the card says of the file.

    Attributes:
        name: of the file.
        rows: lines of the table that tell of the format.
        difference: from torch (`format.difference`).
        weights_hash: SHA-256 of the weights that were exported.
        versions: of the programs that made it.
        code: (packages, lines of Python) that use it on `image.jpg`.
        names_in: where the names of the classes are, "" where only the card has them.
    """

    name: str
    rows: list[tuple[str, str]]
    difference: float
    weights_hash: str
    versions: str
    code: tuple[str, str]
    names_in: str

    def last_rows(self, licence: str | None, evaluation: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
        """Lines of the table that every file has."""
        return [
            ("made by", self.versions),
            ("checked", f"read again, it differs from torch by {self.difference:.1e} at most on random images"),
            ("weights", f"SHA-256 {self.weights_hash}"),
            *evaluation,
            ("licence", " ".join(licence.split()).replace("|", "\\|") if licence else FILL_IN),
        ]


def card(exported: Exported, model: Classifier, weights: Path, licence: str | None) -> str:
    """The text of README.md."""
    network = model.network
    record = record_of(weights) or {}
    count = sum(value.numel() for value in model.model.parameters())
    named = network.task == "classes" or are_names(model.names)
    what = WHAT.get(network.task, f"outputs, of the task {network.task}")
    rows = [
        ("network", f"{_arch(network)}, {count:,} weights"),
        ("learned", f"{network.classes} {what}"),
        ("images", f"fingerprint {record['inputs']['data']}" if record else "unknown"),
        ("crop", "the centre square of an image, resized with an antialiased bilinear filter"),
        *exported.rows,
        *exported.last_rows(licence, _evaluation(weights, exported.weights_hash)),
    ]
    title = f"{exported.name}: {network.arch}, {network.classes} {what.split(',')[0]}"
    classes = class_list(model.names, exported.names_in, "in the order of the logits") if named else ""
    return page(title, rows, classes, exported.code)


def page(title: str, rows: Sequence[tuple[str, str]], classes: str, code: tuple[str, str]) -> str:
    """A card: a table, the names of the classes, and the code that uses the file."""
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    packages, lines = code
    return (
        f"# {title}\n\n| | |\n|---|---|\n{table}\n\n{classes}"
        f"Run it (`pip install {packages}`):\n\n```python\n{lines}\n```\n"
    )


def _arch(network: Network) -> str:
    ours = network.arch in networks.TRUNKS[:2]
    return f"{network.arch}, width {network.width:g}, stride {network.stride}" if ours else network.arch


def class_list(names: tuple[str, ...], held: str, order: str) -> str:
    """A line that names the classes, or says where their names are held."""
    if len(names) > SHOWN and held:
        return f"Names of the classes, {order}, are in {held}.\n\n"
    return f"Classes, {order}: {', '.join(f'`{name}`' for name in names)}.\n\n"


def _evaluation(weights: Path, weights_hash: str) -> list[tuple[str, str]]:
    """The linear probe of exactly these weights, where the run has one."""
    run = weights.resolve().parent.parent
    path, record = run / "eval" / "linear.json", read_record(run, "eval", "linear")
    if not path.is_file() or not record or record["inputs"].get(f"network {run.name}") != weights_hash:
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    scores = found["arms"].get(run.name, {"scores": {}})["scores"]
    measure = next(iter(found["measures"]))
    shown = [f"{layer} {cell[measure]:.1%}" for layer, cell in scores.items() if measure in cell]
    test = found["data"]["test"]
    words = found["measures"][measure].removesuffix(" %")
    return [("linear probe", f"{words} on {test} test images: {', '.join(shown)}")] if shown else []
