"""Turn what a large network learned without labels into a small one, and measure how much was transferred."""

import os

__version__ = "0.1.0"

# torch reads it at its first allocation. Batches and activations are given back to the system and taken again at every
# step: page by page of 4 kB, that takes longer than what is done with them (docs/performance.md).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
