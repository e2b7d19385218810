"""Is the detector sound? RetinaNet from random weights on drawn scenes, and beside torchvision's own on blood cells.

Run as `python benchmarks/detection.py scenes` (bar: AP50 of at least 0.90) and
`python benchmarks/detection.py peer --data ROOT/det_bccd` (bar: at most 3 points of AP50 below
torchvision's RetinaNet with the same ResNet-18 from random weights, pyramid of 64 channels, canvases of 320 pixels,
batches, mirroring and schedule; its losses, anchors, heads and their start are its own: those of its version 2, group
norm in the heads and GIoU, as its version 1 learns nothing from random weights in so few steps). `--quick` shows in a
minute that it runs. Both print one line of JSON a detector, with seconds of training.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ktransfer import networks
from ktransfer.detection import canvas, detectors, losses, metrics, predictions, trunks
from ktransfer.detection.data import Detection
from ktransfer.detection.detectors import Settings
from ktransfer.detection.opening import open_detection
from ktransfer.networks import Network
from ktransfer.training import loop
from ktransfer.training.device import choose_device
from ktransfer.training.options import MachineOptions, TrainOptions

CHANNELS = 64


def ours(classes: int, size: int, anchor: float) -> tuple[nn.Module, Settings]:
    trunk = trunks.build(Network("resnet18"), None, "p3-p7", "bn", 0, CHANNELS)
    settings = Settings("retinanet", "bn", anchor=anchor)
    return detectors.build(trunk, classes, size, settings, 0), settings


def torchvisions(classes: int, size: int) -> tuple[nn.Module, Settings]:
    """The same trunk under torchvision's own pyramid, heads and losses; canvases are handed over in 0..1."""
    body = networks.build(Network("resnet18"), 0, "detection/trunk")
    torch.manual_seed(0)
    layers = {f"layer{number}": str(number) for number in (2, 3, 4)}
    trunk: Any = BackboneWithFPN(body, layers, [128, 256, 512], CHANNELS, LastLevelP6P7(CHANNELS, CHANNELS))
    trunk.how = "0.0,0.0,0.0/1.0,1.0,1.0"
    head = RetinaNetHead(CHANNELS, 9, classes, norm_layer=partial(nn.GroupNorm, CHANNELS // 8))
    head.regression_head._loss_type = "giou"
    return RetinaNet(trunk, classes, min_size=size, max_size=size, head=head), Settings("retinanet")


def train_and_evaluate(
    model: nn.Module,
    settings: Settings,
    parts: tuple[Detection, Detection],
    size: int,
    options: TrainOptions,
    name: str,
) -> dict[str, Any]:
    train, test = parts
    device = choose_device(MachineOptions())
    how: Any = model.backbone
    loss = losses.detection_loss(losses.truth(train, size, device), how.how, 0, (0.8, 1.2))
    rows = torch.arange(len(train))
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        source = canvas.canvases(train, size)
        batches = lambda epoch: loop.epoch_batches(rows, options.batch, 0, epoch)  # noqa: E731
        loop.fit(model, loss, source, batches, options, Path(folder), device, name)
    seconds = time.time() - began
    everything = torch.arange(len(test))
    found = predictions.detect(model, test, canvas.canvases(test, size), everything, size, settings, device)
    scores = metrics.scores(test, found, 0)
    shown = {key: value for key, value in scores.items() if key != "classes"}
    return {"detector": name, "size": size, "epochs": options.epochs, "seconds": round(seconds)} | shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scenes", "peer"), nargs="?", default="scenes")
    parser.add_argument("--data", help="root of det_bccd, for peer")
    parser.add_argument("--spec", default="scenes:images=2000,size=128")
    parser.add_argument("--epochs", type=int, default=0, help="0: 12 for scenes, 40 for peer")
    parser.add_argument("--size", type=int, default=0, help="of the canvases; 0: 128 for scenes, 320 for peer")
    parser.add_argument("--anchor", type=float, default=0.0, help="smallest anchor in strides; 0: 3 for scenes, else 4")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        given.spec, given.epochs = "scenes:images=48,size=128", 1
    spec = given.spec if given.part == "scenes" else given.data
    if spec is None:
        parser.error("peer needs --data, the root of det_bccd")
    parts = open_detection(spec)
    size = given.size or (128 if given.part == "scenes" else 320)
    batch = 16 if given.part == "scenes" else 8
    epochs = given.epochs or (12 if given.part == "scenes" else 40)
    options = TrainOptions(epochs=epochs, batch=batch, lr=given.lr * batch / 16, weight_decay=1e-4)
    classes = len(parts[0].classes)
    anchor = given.anchor or (3.0 if given.part == "scenes" else 4.0)
    report = train_and_evaluate(*ours(classes, size, anchor), parts, size, options, "ours")
    print(json.dumps(report), flush=True)
    if given.part == "scenes":
        print(f"AP50 {report['AP50']:.3f}: {'reaches' if report['AP50'] >= 0.9 else 'misses'} the bar of 0.90")
        return
    peer = train_and_evaluate(*torchvisions(classes, size), parts, size, options, "torchvision")
    print(json.dumps(peer), flush=True)
    print(f"AP50 {100 * (report['AP50'] - peer['AP50']):+.1f} points beside torchvision's; the bar is -3.0")


if __name__ == "__main__":
    main()
