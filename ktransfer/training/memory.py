"""What a training needs of the device's memory, said before it starts, and what to do where it did not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ktransfer import distributed
from ktransfer.data.loader import available_bytes
from ktransfer.errors import StageError
from ktransfer.progress import say
from ktransfer.training.batch import Batch, Loss, Source
from ktransfer.training.batch_divider import pieces
from ktransfer.training.device import autocast, move
from ktransfer.training.norms import has_batch_norm
from ktransfer.training.options import LoopOptions

_TRIED = (2, 3)  # images whose activations are measured; batch norm needs two


class Need(NamedTuple):
    """Bytes of a training on one device: `fixed` whatever is computed at once, and for each image `each`."""

    fixed: int
    each: int


def measure(
    model: nn.Module,
    loss: Loss,
    images: Source,
    rows: Tensor,
    options: LoopOptions,
    device: torch.device,
    following: int,
) -> Need:
    """Parameters, gradients, momentum and a batch of pixels; and what a forward pass keeps for the way back.

    The latter is measured on the first of (n,) `rows`, which are enough for three images and those `following`; their
    images may be broken. The model is moved to the device and otherwise left as it was.
    """
    move(model, device)
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    copies = 2 + (options.momentum > 0) + (distributed.world_size() > 1)  # the last: gradients laid out for sending
    chosen, pixels, _, _ = next(iter(images.batches(iter([rows[: max(_TRIED) + following]]))))
    before = [value.clone() for value in model.buffers()]
    sizes: list[int] = []
    for count in _TRIED:
        first = slice(0, count + following)
        valid = torch.ones(count + following, dtype=torch.bool, device=device)
        batch = Batch(chosen[first].to(device), pixels[first].to(device), valid, 0, True)
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(options, device):
            loss(model, batch)
        stored = sorted(storage.nbytes() for storage in kept.values())
        sizes.append(sum(stored) + 2 * stored[-1])  # on the way back the largest has a gradient, and gets one
    with torch.no_grad():
        for value, old in zip(model.buffers(), before, strict=True):
            value.copy_(old)
    each = max(1, (sizes[1] - sizes[0]) // (_TRIED[1] - _TRIED[0]))
    share = -(-options.batch // distributed.world_size()) + following
    return Need(own * copies + max(0, sizes[0] - each * _TRIED[0]) + share * pixels[0].nbytes, each)


def tell_plan(
    model: nn.Module,
    loss: Loss,
    images: Source,
    rows: Tensor,
    options: LoopOptions,
    device: torch.device,
    label: str,
    following: int = 0,
) -> None:
    """Say before a training what it needs and what is free, and which flag helps where that is less (see `measure`)."""
    if len(rows) < max(_TRIED) + following:
        return
    with explained(model, device, label, options):
        need = measure(model, loss, images, rows, options, device, following)
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else available_bytes() // distributed.local_world_size()
    most = max(last - first for first, last in pieces(min(options.batch, len(rows)), options.micro_batch))
    most = -(-most // distributed.world_size())
    total = need.fixed + most * need.each
    say(
        f"{label}: memory: {need.fixed / 1e9:.2g} GB, and {most * need.each / 1e9:.2g} GB for {most} images at once; "
        f"{free / 1e9:.3g} GB are free on {device}"
    )
    if total > free:
        fits = (free - need.fixed) // need.each * distributed.world_size()
        way = f"--micro-batch {fits}" if fits >= 2 else "a smaller --width or --size"
        say(f"{label}: memory may not suffice; if it runs out, give {way}{_caution(model) if fits >= 2 else ''}")


@contextmanager
def explained(model: nn.Module, device: torch.device, label: str, options: LoopOptions) -> Iterator[None]:
    """Within, running out of memory is a StageError that names the way out.

    Raises:
        StageError: see above.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error).lower()
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "can't allocate memory" not in said and "not enough memory" not in said:
            raise
        now = options.micro_batch or options.batch
        anew = " --overwrite, as statistics of batch norm are then of so many images" if has_batch_norm(model) else ""
        raise StageError(
            f"{label}: out of memory on {device} with {now} images at once; give the same command with "
            f"--micro-batch {max(2, now // 2)}{anew}"
        ) from error


def _caution(model: nn.Module) -> str:
    return " (batch norm will use statistics of so many images)" if has_batch_norm(model) else ""
