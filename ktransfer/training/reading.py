"""Reading images before a training, by all processes of the command; the others keep them for what comes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ktransfer import distributed
from ktransfer.data.dataset import Dataset, check_broken
from ktransfer.data.loader import ImageLoader, readable
from ktransfer.data.opening import open_dataset
from ktransfer.errors import StageError
from ktransfer.progress import bar

_kept: ImageLoader | None = None  # of a process that serves


def readable_by_all(images: ImageLoader, rows: Tensor, max_broken: float) -> Tensor:
    """`images.readable`, each process reading its share; the leader's call.

    Args, returns and raises: as there.
    """
    if distributed.world_size() == 1:
        return readable(images, rows, max_broken)
    order = {"do": "read", "size": images.size, "workers": images.workers, "cache": images.cache}
    distributed.send_order(order | {"device": str(images.device)} | data_facts(images.dataset), rows.numpy())
    distributed.agree(None)
    valid = np.zeros(len(rows), np.uint8)
    own = distributed.share(len(rows))[1]
    with distributed.opening():
        valid[:own] = _valid(images, rows[:own], len(rows))
    distributed.gather_rows(valid, len(rows))
    known = torch.from_numpy(valid).bool()
    images.batch(rows[~known])  # so that their reasons are known here
    check_broken(images.broken, len(rows), max_broken, images.dataset)
    return readable(images, rows[known], max_broken) if int(known.sum()) < 2 else rows[known]


def read_share(order: dict[str, Any]) -> None:
    """Another process reads its share, and keeps the images open."""
    global _kept
    with distributed.opening():
        data = same_data(order)
        device = torch.device(order["device"])
        _kept = ImageLoader(data, order["size"], order["workers"], cache=order["cache"], device=device)
    rows = torch.from_numpy(order["arrays"][0])
    first, last = distributed.share(len(rows))
    with distributed.opening():
        valid = _valid(_kept, rows[first:last], 0)
    distributed.gather_rows(valid, len(rows))


def kept_images(order: dict[str, Any]) -> ImageLoader:
    """The images that this process has read for the training of an order."""
    assert _kept is not None and _kept.dataset.fingerprint == order["fingerprint"]
    return _kept


def data_facts(data: Dataset) -> dict[str, str]:
    """What an order says of its images."""
    return {"data": data.spec, "fingerprint": data.fingerprint}


def same_data(order: dict[str, Any]) -> Dataset:
    """The images of an order, opened by another process.

    Raises:
        UsageError: they are not here.
        StageError: they are not the leader's.
    """
    data = open_dataset(order["data"])
    if data.fingerprint != order["fingerprint"]:
        raise StageError(f"{order['data']}: has other images here than for the first process; copy those here")
    return data


def _valid(images: ImageLoader, rows: Tensor, shown: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(n,) whether each of the rows can be read; the bar runs to `shown`, as if all processes were equally far."""
    found = [np.zeros(0, np.uint8)]
    done = 0
    with bar(shown, "check images") as progress:
        for chosen, _, valid, _ in images.batches(iter(rows.split(256))):
            found.append(valid.numpy().astype(np.uint8))
            done += len(chosen)
            progress.update(shown * done // len(rows) - progress.n)
    return np.concatenate(found)
