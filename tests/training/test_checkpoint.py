"""A checkpoint that cannot be read now is kept, and nobody is advised to begin anew."""

import errno
import os
from pathlib import Path

import pytest
import torch

from ktransfer.errors import Unreadable
from ktransfer.training.checkpoint import Checkpoint


def test_what_cannot_be_read_now_may_be_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    kept = Checkpoint(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1), None)
    kept.save(3)

    def fail(error: Exception) -> None:
        def load(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(torch, "load", load)

    for number in (errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE):
        fail(OSError(number, os.strerror(number)))
        with pytest.raises(Unreadable) as caught:
            kept.restore(torch.device("cpu"))
        assert os.strerror(number) in str(caught.value) and "overwrite" not in str(caught.value)
    fail(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        kept.restore(torch.device("cpu"))
    monkeypatch.undo()
    assert kept.restore(torch.device("cpu")) == 3
