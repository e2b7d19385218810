"""The extension is used only where it was built of the sources beside it."""

import ctypes

import pytest

from ktransfer.cluster.engines import native


def test_an_extension_of_other_sources_is_not_used(monkeypatch):
    if native.library() is None:
        pytest.skip("the extension was not built here")

    class Older(ctypes.Structure):
        _fields_ = native.Job._fields_[:-1]

    monkeypatch.setattr(native, "Job", Older)
    assert native.library.__wrapped__() is None
