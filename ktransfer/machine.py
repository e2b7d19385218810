"""What a process gets from its machine: cores, and streams that somebody may read."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

CLOSED = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ESHUTDOWN)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Lasting:
    """A stream that nobody may be left to read: what cannot be written is lost, and the work goes on.

    Two of the same stream are equal, so that tqdm knows which bars stand where a line is to be written.

    Args:
        stream: of text; None where the process has none.
        lost: the errors after which it is taken for closed; all by default. Others are raised.
    """

    def __init__(self, stream: Any, lost: tuple[int, ...] = ()) -> None:
        self._stream, self._lost = stream, lost

    def write(self, text: str) -> int:
        """As of the stream; where that is closed, into nothing, as all that follows."""
        with self._writing():
            return int(self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As of the stream, in the same way."""
        with self._writing():
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether people see it."""
        try:
            return bool(self._stream.isatty())
        except (OSError, ValueError, AttributeError):
            return False

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, AttributeError):  # closed by the program, or never there
            pass
        except OSError as error:
            if self._lost and error.errno not in self._lost:
                raise
            # What is left in its buffers would fail again when Python ends, and give an exit code of its own.
            with contextlib.suppress(OSError, ValueError):
                _lead_nowhere(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's."""
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        """Whether both are of one stream."""
        return isinstance(other, Lasting) and self._stream is other._stream

    def __hash__(self) -> int:
        """As equality is."""
        return id(self._stream)


def stderr() -> Any:
    """Where lines and bars go."""
    return sys.stderr if isinstance(sys.stderr, Lasting) else Lasting(sys.stderr)


def keep_streams() -> None:
    """Of a process that was started with closed streams: have them lead nowhere.

    Else the first files that are opened would be taken for them, by whatever writes to these numbers.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _lead_nowhere(number)
    both: Any = Lasting(sys.stdout, CLOSED), Lasting(sys.stderr)
    sys.stdout, sys.stderr = both


def _lead_nowhere(number: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)
