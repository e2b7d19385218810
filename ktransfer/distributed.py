"""Several processes of one command, as torchrun starts them: the first leads, the others serve it.

The leader alone reads settings, holds the lock, writes and prints; what the others do for it is sent to them as orders,
each of which ends with all processes knowing whether one has failed. So a stage needs no second version for many
processes, and nothing can drift apart between them. Messages and numbers travel by gloo through the processes' main
memory, whatever device they compute on; only what a training sums up in each step takes `StepGroup` of its own.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktransfer.errors import KTransferError, StageError, Stopped, UsageError
from ktransfer.machine import stderr

MEETING = timedelta(minutes=5)
QUIET = 5.0  # seconds of waiting for the others, until a line says so
PATIENCE = timedelta(days=30)  # the others wait while the leader works alone
_group: Any = None
_sharing_gpus = False  # more processes on this machine than GPUs


class PeerLost(StageError):
    """Another process of the command ended without a word."""


class PeerFailed(StageError):
    """A failure that all processes know of; the leader's message is the one for people."""


def started() -> int:
    """How many processes torchrun started (WORLD_SIZE); 1 without it.

    Raises:
        UsageError: WORLD_SIZE is no number.
    """
    return environment_number("WORLD_SIZE", 1)


def is_leader() -> bool:
    """Whether this process is the one that writes and prints: the first, or the only one."""
    return (os.environ.get("WORLD_SIZE") or "1") == "1" or (os.environ.get("RANK") or "0") == "0"


def world_size() -> int:
    """Processes that work together within `joined`; 1 outside."""
    import torch.distributed as dist

    return 1 if _group is None else int(dist.get_world_size(_group))


def rank() -> int:
    """This one's, from 0; 0 leads."""
    import torch.distributed as dist

    return 0 if _group is None else int(dist.get_rank(_group))


def local_world_size() -> int:
    """Processes of this command on this machine."""
    return environment_number("LOCAL_WORLD_SIZE", started()) if _group is not None else 1


def share(rows: int, of: int | None = None) -> tuple[int, int]:
    """[first, last) of the contiguous rows that process `of` (this one when not given) works on."""
    who = rank() if of is None else of
    return rows * who // world_size(), rows * (who + 1) // world_size()


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes of this torchrun; nothing happens where there is one. Each gets one GPU of its machine.

    Raises:
        UsageError: the variables that torchrun sets are incomplete.
        StageError: not all processes came.
    """
    global _group
    world = started()
    if world == 1:
        yield
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: start several processes by "
            "torchrun --nproc-per-node N -m -- ktransfer ..., or unset WORLD_SIZE"
        )
    _choose_gpu()
    import torch.distributed as dist

    waiting = threading.Timer(QUIET, _tell_waiting, (world,))
    waiting.daemon = True
    waiting.start()
    try:
        dist.init_process_group("gloo", timeout=MEETING)
        # Another group, as the time for meeting is also the time that one may wait for a message.
        _group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise StageError(
            f"torchrun: the {world} processes could not connect at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({str(error).splitlines()[0]}); check that all were started, and that this address can be reached"
        ) from error
    finally:
        waiting.cancel()
    yield
    _group = None
    dist.destroy_process_group()  # after an error the connections last until the process ends, as `rest` relies on


def _tell_waiting(world: int) -> None:
    """Said by whoever waits: which of the processes is missing, none of them knows."""
    print(
        f"ktransfer: waiting for the other {world - 1} of {world} processes at {os.environ['MASTER_ADDR']}:"
        f"{os.environ['MASTER_PORT']} (this is RANK {os.environ['RANK']}), for at most {MEETING.seconds // 60} "
        "minutes; if none was started, these variables were left in the shell: unset WORLD_SIZE RANK",
        file=stderr(),
        flush=True,
    )


@contextmanager
def leading() -> Iterator[None]:
    """The leader's work within `joined`; at its end the others are sent home, with the exit code of an error."""
    code = 0
    try:
        yield
    except (PeerLost, Stopped):  # nobody to talk to, or in the middle of a talk: closed connections say enough
        raise
    except Exception as error:
        code = error.exit_code if isinstance(error, KTransferError) else 1
        with suppress(PeerLost):
            _end(code)
        raise
    _end(code)


def _end(code: int) -> None:
    if world_size() > 1:
        send_order({"do": "end", "code": code})


def send_order(message: dict[str, Any], *arrays: NDArray[Any]) -> None:
    """The leader sends a message (JSON) and arrays to all others."""
    message = message | {"arrays": [(array.shape, array.dtype.str) for array in arrays]}
    data = np.frombuffer(json.dumps(message).encode(), np.uint8).copy()
    broadcast(np.array([len(data)]))
    broadcast(data)
    for array in arrays:
        broadcast(np.ascontiguousarray(array))


def receive_order() -> dict[str, Any]:
    """Another process waits for the leader's next message; its arrays are in the list `arrays`."""
    length = broadcast(np.zeros(1, np.int64))
    found: dict[str, Any] = json.loads(broadcast(np.zeros(int(length[0]), np.uint8)).tobytes())
    found["arrays"] = [broadcast(np.empty(shape, dtype)) for shape, dtype in found["arrays"]]
    return found


def serve(servant: Callable[[str], Callable[[dict[str, Any]], None]]) -> int:
    """What the other processes do until the leader ends; the exit code that it gives.

    Args:
        servant: the word behind "do" in an order -> the function that carries it out.
    """
    while True:
        order = receive_order()
        if order["do"] == "end":
            if order["code"]:
                outlast_leader()
            return int(order["code"])
        with suppress(PeerFailed):  # all know; the leader decides what comes next
            servant(order["do"])(order)


@contextmanager
def opening() -> Iterator[None]:
    """The part of an order that can fail; at its end all processes know whether it did (the leader by `agree`)."""
    try:
        yield
    except Exception as error:
        agree(error)
    else:
        agree(None)


def outlast_leader() -> None:
    """Outlast the leader: torchrun stops all others when one fails, and the leader is to say why before."""
    with suppress(PeerLost):
        receive_order()


def broadcast(array: NDArray[Any], source: int = 0) -> NDArray[Any]:
    """The array of process `source` for all; the others' are filled in place. Contiguous."""
    import torch
    import torch.distributed as dist

    with _connection():
        dist.broadcast(torch.from_numpy(array), source, group=_group)
    return array


def sum_to_leader(part: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of all processes' arrays, whole in the leader only; always added in the order of their numbers."""
    import torch
    import torch.distributed as dist

    # Each process adds up one piece of the array; so no link carries more than twice the array.
    size = -(-part.size // world_size())
    sent = torch.zeros(world_size() * size, dtype=torch.float64)
    sent[: part.size] = torch.from_numpy(part.reshape(-1))
    came = torch.empty_like(sent)
    with _connection():
        dist.all_to_all_single(came, sent, group=_group)
    first, *others = came.view(world_size(), size).unbind()
    for other in others:
        first += other
    pieces = list(sent.view(world_size(), size).unbind()) if rank() == 0 else None
    with _connection():
        dist.gather(first, pieces, dst=0, group=_group)
    return sent[: part.size].numpy().reshape(part.shape)


def gather_rows(array: NDArray[Any], rows: int) -> None:
    """The others send their `share` of `rows` to the leader, who holds an array of all of them."""
    import torch
    import torch.distributed as dist

    with _connection():
        if rank():
            if len(array):
                dist.send(torch.from_numpy(array), 0, group=_group)
            return
        for other in range(1, world_size()):
            first, last = share(rows, other)
            if first < last:
                dist.recv(torch.from_numpy(array[first:last]), other, group=_group)


def agree(error: Exception | None) -> None:
    """All processes learn whether one of them failed.

    Raises:
        UsageError, StageError: in the leader, the failure of the lowest number.
        PeerFailed: in the others.
    """
    all_gather((), error)


def all_gather(values: Sequence[int], error: Exception | None = None) -> list[list[int]]:
    """All processes learn some numbers of each, and whether one of them failed.

    Args:
        values: equally many in all processes.
        error: why this one failed; that it lost another one explains nothing where that one has a reason of its own.

    Returns:
        Process -> its values.

    Raises:
        As `agree`; where there is one process alone, the error itself.
    """
    if world_size() == 1:
        if error is not None:
            raise error
        return [list(values)]
    import torch
    import torch.distributed as dist

    line = b""
    if error is not None:
        said = str(error) if isinstance(error, KTransferError) else f"{type(error).__name__}: {error}"
        line = (f"process {rank()}: {said}" if rank() else said).encode("utf-8", "backslashreplace")
    code = 0 if error is None else error.exit_code if isinstance(error, KTransferError) else 1
    states = torch.zeros(world_size(), 3 + len(values), dtype=torch.int64)
    own = torch.tensor([[code, isinstance(error, PeerLost), len(line), *values]])
    with _connection():
        dist.all_gather(list(states.split(1)), own, group=_group)
    failed = [(lost, who) for who, (code, lost, *_) in enumerate(states.tolist()) if code]
    if failed:
        who = min(failed)[1]
        code, _, length, *_ = states[who].tolist()
        text = np.frombuffer(line, np.uint8).copy() if who == rank() else np.zeros(length, np.uint8)
        said = broadcast(text, who).tobytes().decode()
        if rank():
            raise PeerFailed(said) from error
        raise (UsageError if code == UsageError.exit_code else StageError)(said) from error
    return [row[3:] for row in states.tolist()]


def send(array: NDArray[Any], to: int = 0) -> None:
    """An array to process `to`, which waits for one of the same shape by `receive`. Contiguous."""
    import torch
    import torch.distributed as dist

    with _connection():
        dist.send(torch.from_numpy(array), to, group=_group)


def receive(array: NDArray[Any], source: int) -> NDArray[Any]:
    """The array, filled with what process `source` sends. Contiguous."""
    import torch
    import torch.distributed as dist

    with _connection():
        dist.recv(torch.from_numpy(array), source, group=_group)
    return array


class StepGroup:
    """What all processes sum up on their devices: by NCCL where each has a GPU of its own, else by gloo.

    One that fails can leave it: the others, waiting for its numbers, then get PeerLost, and can still be told why. Made
    and used by all processes at the same time.
    """

    def __init__(self, cuda: bool) -> None:
        import torch.distributed as dist

        nccl = cuda and dist.is_nccl_available() and not _sharing_gpus
        with _connection():
            self._group: Any = dist.new_group(backend="nccl" if nccl else "gloo", timeout=PATIENCE)

    def sum(self, tensor: Any) -> None:
        """Add up all processes' tensors in place; all get the same bytes."""
        import torch.distributed as dist

        with _connection():
            dist.all_reduce(tensor, group=self._group)

    def cut(self) -> None:
        """Let go of the others."""
        import torch.distributed as dist

        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)


@contextmanager
def _connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(
            "torchrun: another process of this command ended unexpectedly (killed, or out of memory?); "
            "nothing is lost: give the same command again"
        ) from error


def _choose_gpu() -> None:
    """Leave this process one of the machine's GPUs, before anything has looked for them."""
    global _sharing_gpus
    import torch

    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    if devices != [""]:
        _sharing_gpus = environment_number("LOCAL_WORLD_SIZE", started()) > len(devices)
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[environment_number("LOCAL_RANK", 0) % len(devices)]


def environment_number(name: str, default: int) -> int:
    """What torchrun set; the default where it is not set, or empty.

    Raises:
        UsageError: it is no number.
    """
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UsageError(f"{name} is '{text}', must be a number: torchrun sets it")
    return int(text or default)
