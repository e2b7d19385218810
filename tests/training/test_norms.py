"""Batch norm over all processes: of one alone it is what the module computes itself."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from ktransfer.training import norms


@pytest.mark.parametrize("made", [nn.BatchNorm2d, BatchNormAct2d])
def test_one_process_computes_what_the_module_does(made):
    x = torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(0))
    own, other = made(6), made(6)
    with norms.over_all(nn.Sequential(other), lambda sums: None):
        torch.testing.assert_close(other(x), own(x))
    torch.testing.assert_close(other.running_var, own.running_var)
    torch.testing.assert_close(other.eval()(x), own.eval()(x))
