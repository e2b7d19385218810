"""Importing ktransfer asks torch for huge pages, and whoever set the variable before is obeyed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import resource
import ktransfer, torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = faults()
torch.empty(2**26, dtype=torch.uint8).fill_(1)
print(faults() - before)
"""


def faults(setting: str | None) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if setting is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = setting
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    not SWITCH.exists() or "[madvise]" not in SWITCH.read_text(), reason="needs Linux with huge pages on request"
)
def test_large_tensors_take_huge_pages_unless_told_otherwise() -> None:
    pages = 2**26 // 4096
    assert faults("0") > 0.9 * pages
    assert faults(None) < 0.5 * pages
