"""`doctor` names what is there, and goes on where a part fails."""

import sys
from pathlib import Path

import faiss
import numpy as np
import torch

from ktransfer import __version__, doctor


def table():
    lines = doctor.report().splitlines()
    return {line[:14].strip(): line[15:] for line in lines}


def test_the_report_names_versions_devices_and_a_working_faiss():
    found = table()
    assert found["ktransfer"] == __version__ and torch.__version__.startswith(found["torch"])
    assert "numpy" in found and found["numpy"] == np.__version__
    assert f"{torch.get_num_threads()} threads" in found["machine"]
    assert found["device"].split(",")[0] in ("cpu", "cuda") and found["device"].endswith(
        ("bfloat16 on", "bfloat16 off")
    )
    assert found["faiss"].startswith("works, ")


def test_a_missing_faiss_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert table()["faiss"].startswith("cannot be imported (") and "pip install faiss" in table()["faiss"]


def test_a_faiss_that_computes_wrongly_is_said(monkeypatch):
    monkeypatch.setattr(faiss, "knn", lambda rows, _, k: (np.zeros((len(rows), k)), np.zeros((len(rows), k), np.int64)))
    assert table()["faiss"].startswith("gives wrong neighbours")


def test_unknown_memory_is_said(monkeypatch):
    assert table()["machine"].endswith(" GB memory")

    def refuse(self, *arguments, **more):
        raise PermissionError(13, "no")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert doctor._memory() == "memory unknown"
