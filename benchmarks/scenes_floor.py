"""How far raw pixels go on `scenes:` beside a small trained network; run as `python benchmarks/scenes_floor.py`.

Chance is 1/12. The linear classifier is logistic regression on 32x32 colour pixels, its regularisation chosen on the
test part, in its own favour.
"""

import time
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ktransfer.data.scenes import CLASSES, render

TRAIN, VAL, SIZE, EPOCHS, BATCH = 3000, 600, 64, 12, 50


def drawn(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.stack([render(0, part, index, SIZE)[0] for index in range(count)])
    return pixels, np.arange(count) % len(CLASSES)


def small(pixels: np.ndarray) -> np.ndarray:
    return (
        np.stack([np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BOX)).ravel() for p in pixels]) / 255
    )


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    widths = (3, 32, 64, 96, 128)
    for before, after in pairwise(widths):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(widths[-1] * (SIZE // 16) ** 2, len(CLASSES))
    )


def tensor(pixels: np.ndarray) -> Tensor:
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) * 4


def shifted(batch: Tensor) -> Tensor:
    if torch.rand(()) < 0.5:
        batch = batch.flip(3)
    dy, dx = (int(n) for n in torch.randint(-6, 7, (2,)))
    return batch.roll((dy, dx), (2, 3))


def main() -> None:
    torch.manual_seed(0)
    began = time.perf_counter()
    x, y = drawn("train", TRAIN)
    xv, yv = drawn("val", VAL)
    each = (time.perf_counter() - began) / (TRAIN + VAL)
    print(f"{TRAIN} + {VAL} images of {SIZE} pixels, {each * 1e3:.2f} ms each; chance {1 / len(CLASSES):.1%}")
    flat, flat_val = small(x), small(xv)
    mean, spread = flat.mean(0), flat.std(0)
    scores = {}
    for strength in (1e-5, 1e-4, 1e-3):
        model = LogisticRegression(C=strength, max_iter=300).fit((flat - mean) / spread, y)
        scores[strength] = model.score((flat_val - mean) / spread, yv)
    print("logistic regression on pixels: " + ", ".join(f"C={c:g} {s:.1%}" for c, s in scores.items()), flush=True)
    began = time.perf_counter()
    model, images, labels = network(), tensor(x), torch.from_numpy(y)
    steps = EPOCHS * TRAIN // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for epoch in range(EPOCHS):
        model.train()
        for rows in torch.randperm(TRAIN).split(BATCH):
            loss = nn.functional.cross_entropy(model(shifted(images[rows])), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        if epoch % 4 == 3:
            model.eval()
            with torch.no_grad():
                right = (model(tensor(xv)).argmax(1).numpy() == yv).mean()
            spent = time.perf_counter() - began
            print(
                f"small network, epoch {epoch + 1}: loss {loss.item():.3f}, val {right:.1%}, {spent:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
