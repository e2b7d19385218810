"""The network that solves a task: one trunk for all tiles of an example, and a head that sees them together."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ktransfer import networks, rng
from ktransfer.networks import Network, scaled


class TaskHead(nn.Module):
    """fc6 shared by the tiles, their concatenation, fc7 and fc8 (docs/papers.md).

    (batch * tiles, channels, h, w) -> (batch, classes). Maps larger than 4x4 are max-pooled to 4x4.
    """

    def __init__(self, maps: torch.Size, width: float, tiles: int, classes: int, batch_norm: bool) -> None:
        super().__init__()
        self.tiles = tiles
        side = min(4, maps[-1])
        fc6, fc7 = scaled(1024, width), scaled(4096, width)
        self.pool = nn.AdaptiveMaxPool2d(side)
        self.fc6 = nn.Linear(maps[1] * side**2, fc6)
        self.fc7 = nn.Linear(tiles * fc6, fc7)
        self.fc8 = nn.Linear(fc7, classes)
        self.bn6: nn.Module = nn.BatchNorm1d(fc6) if batch_norm else nn.Identity()
        self.bn7: nn.Module = nn.BatchNorm1d(fc7) if batch_norm else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """See the class."""
        x = self.bn6(self.fc6(self.pool(maps).flatten(1))).relu()
        x = nn.functional.dropout(x, 0.5, self.training)
        x = self.bn7(self.fc7(x.view(-1, self.tiles * x.shape[1]))).relu()
        logits: Tensor = self.fc8(nn.functional.dropout(x, 0.5, self.training))
        return logits


class TaskNet(nn.Module):
    """(batch, tiles, 3, side, side) float32 -> (batch, classes) logits."""

    def __init__(self, network: Network, tiles: int, side: int, classes: int, seed: int) -> None:
        super().__init__()
        self.trunk = networks.build(replace(network, classes=0), seed, "pretext/trunk")
        with torch.no_grad():
            maps = self.trunk.eval()(torch.zeros(1, 3, side, side)).shape
        self.trunk.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.torch_seed(seed, "pretext/head", 0))
            batch_norm = network.arch.endswith("_bn")
            self.head = networks.he_init(TaskHead(maps, network.width, tiles, classes, batch_norm))

    def forward(self, tiles: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.head(self.trunk(tiles.flatten(0, 1)))
        return logits

    def weights(self) -> dict[str, Tensor]:
        """State with the trunk's own names, and the head's below `head.`."""
        head = {networks.HEAD + name: value for name, value in self.head.state_dict().items()}
        return self.trunk.state_dict() | head
