"""The papers' claims, each decided by a study that says beforehand what it expects: docs/claims.md.

Run as `python benchmarks/claims.py [--out RUNS] [--only 04,06] [--list]`, or `make claims`. Every recipe of
recipes/claims/ is carried out in RUNS/NAME; killed and given again, it goes on. What several studies of the chain share
is made once, in RUNS/steps. Real images are those of data/ (docs/claims.md). The table between the markers of
docs/claims.md is written anew from what is in RUNS; a recipe without a result keeps the row that it has.
"""

import argparse
import re
import tomllib
from pathlib import Path

from ktransfer import files, tables
from ktransfer.errors import KTransferError
from ktransfer.retrain.selftraining.study import study as of_selftraining
from ktransfer.run import records
from ktransfer.study import claim
from ktransfer.study.carrying import STEPS, distinct
from ktransfer.study.carrying import study as of_chain
from ktransfer.study.recipe import read

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes" / "claims"
SHEET = ROOT / "docs" / "claims.md"
BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"
HEADER = ["claim", "published", "expected here", "measured", "verdict", "hours"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--only", default="", help="numbers of recipes, such as 04,06")
    parser.add_argument(
        "--list", action="store_true", help="write the table from the results that are there, run nothing"
    )
    given = parser.parse_args()
    chosen = [
        path for path in sorted(RECIPES.glob("*.toml")) if not given.only or path.stem[:2] in given.only.split(",")
    ]
    for recipe in [] if given.list else chosen:
        print(f"\nclaims: {recipe.stem}", flush=True)
        try:
            carry_out(recipe, given.out)
        except KTransferError as error:
            print(f"claims: {recipe.stem} is left out: {error}", flush=True)
    SHEET.write_text(with_rows(SHEET.read_text(), given.out))
    print(f"claims: {SHEET}")


def carry_out(recipe: Path, out: Path) -> None:
    """One study; steps of the chain lie in a folder that all studies share."""
    run = out / recipe.stem
    if "selftrain" in tomllib.loads(recipe.read_text()):
        of_selftraining(recipe, run)
        return
    run.mkdir(parents=True, exist_ok=True)
    (out / STEPS).mkdir(exist_ok=True)
    if not (run / STEPS).is_symlink():
        (run / STEPS).symlink_to(Path("..") / STEPS)
    of_chain(recipe, run)


def with_rows(sheet: str, out: Path) -> str:
    """The sheet with a row for each recipe: of its result, else the row that it has, else that it was not run."""
    before, _, rest = sheet.partition(BEGIN)
    held, _, after = rest.partition(END)
    old = {row[2:4]: row for row in held.splitlines() if re.match(r"\| \d\d ", row)}
    lines = tables.markdown(HEADER, [])
    lines += [_row(recipe, out, old.get(recipe.stem[:2])) for recipe in sorted(RECIPES.glob("*.toml"))]
    return "\n".join([before + BEGIN, *lines, END + after])


def _row(recipe: Path, out: Path, old: str | None) -> str:
    stated = tomllib.loads(recipe.read_text())["claim"]
    place = out / recipe.stem / "study.json"
    result = files.read_json(place).get("claim") if place.exists() else None
    if result is None and old is not None:
        return old
    measured, verdict, hours = "-", "not run", "-"
    if result is not None:
        found = [claim.Found(**one) for one in result["found"]]
        parts = [
            f"{claim.contrast_in_words(contrast)}: {claim.found_in_words(one)}"
            for contrast, one in zip(result["contrasts"], found, strict=True)
        ]
        measured, verdict = "; ".join(parts), f"**{result['verdict']}**"
        hours = f"{_seconds(recipe, out) / 3600:.1f}"
    expected = f"{stated['expect']}, bound {stated['bound']:g} ({stated['measure']}{_columns(stated)})"
    cells = [
        f"{recipe.stem[:2]} {stated['text']}",
        f"{stated['published']} ({stated['source']})",
        expected,
        measured,
        verdict,
        hours,
    ]
    return tables.markdown(cells, [])[0]


def _columns(stated: dict[str, object]) -> str:
    columns = stated.get("columns")
    return f", mean of {', '.join(map(str, columns))}" if isinstance(columns, list) else ""


def _seconds(recipe: Path, out: Path) -> float:
    """The time of all steps that a study rests on, also of those that others share."""
    if "selftrain" in tomllib.loads(recipe.read_text()):
        places = [path.parent for path in (out / recipe.stem).rglob("stage.json")]
    else:
        places = [out / STEPS / step.name / step.folder for step in distinct(read(recipe))]
    return sum(record["seconds"] for place in places for record in records(place).values())


if __name__ == "__main__":
    main()
