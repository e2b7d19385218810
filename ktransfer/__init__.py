"""Turn what a large network learned without labels into a small one, and measure how much came across."""

__version__ = "0.1.0"
