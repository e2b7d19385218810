"""Results as tables: for the screen and README (Markdown), for programs (CSV)."""

from typing import Any

from ktransfer import tables

TASKS = {
    "random": "random weights",
    "jigsaw": "trained on Jigsaw",
    "jigsawpp": "trained on Jigsaw++",
    "rotation": "trained on rotations",
    "context": "trained on context",
    "pseudo-labels": "retrained on pseudo-labels",
    "classes": "trained on true labels",
    "features": "retrained on features",
}

CSV = ("protocol", "arm", "arch", "task", "column", "measure", "value", "low", "high", "deviation")


def to_markdown(result: dict[str, Any]) -> str:
    """A table for each measure, in per cent, +- half of the 95 % interval, and the deviation over seeds."""
    arms = result["arms"]
    lines: list[str] = []
    for measure, words in result["measures"].items():
        columns = columns_of(arms, measure)
        if not columns:
            continue  # of labels of another kind
        rows = [
            [title(name, arm), *(cell_text(arm, column, measure) for column in columns)]
            for name, arm in arms.items()
            if any(measure in found for found in arm["scores"].values())
        ]
        lines += [*tables.markdown(*tables.turned([f"{result['title']}, {words}", *columns], rows), aligned=True), ""]
    return "\n".join([*lines, footer(result)]) + "\n"


def footer(result: dict[str, Any]) -> str:
    """What a result was measured on."""
    data = result["data"]
    cells = [cell for arm in result["arms"].values() for cell in arm["scores"].values()]
    most = max((cell["images"] for cell in cells if "images" in cell), default=data["test"])
    evaluated = f" ({most} of them evaluated)" if most < data["test"] else ""
    counts = f"{data['train']} images to train, {data['test']} to test{evaluated}, {data['classes']} classes, "
    counts += _normalised(result)
    note = result.get("note", f"{counts}chance {result['chance']:.1%}.").replace("{counts}", counts)
    return f"{result['protocol']}: {note}"


def _normalised(result: dict[str, Any]) -> str:
    """Which rows' inputs are normalised otherwise than those of others, as that alone changes a row."""
    ways: dict[str, list[str]] = {}
    for name, how in result.get("normalised", {}).items():
        ways.setdefault(how, []).append(name)
    if len(ways) < 2:
        return ""
    return (
        "images normalised differently ("
        + "; ".join(f"{how}: {', '.join(names)}" for how, names in ways.items())
        + "), "
    )


def columns_of(arms: dict[str, Any], measure: str) -> list[str]:
    """The columns in which any of the networks has a measure, in order."""
    return list(
        dict.fromkeys(column for arm in arms.values() for column, found in arm["scores"].items() if measure in found)
    )


def to_csv(result: dict[str, Any]) -> str:
    """One line for each arm, column and measure; shares, not per cent."""
    rows = []
    for name, arm in result["arms"].items():
        named = {"protocol": result["protocol"], "arm": name, "arch": arm["arch"], "task": arm["task"]}
        for column, found in arm["scores"].items():
            for measure in (measure for measure in result["measures"] if measure in found):
                low, high = found[f"{measure}_interval"]
                numbers = {"value": found[measure], "low": low, "high": high}
                numbers |= {"deviation": found[f"{measure}_deviation"]} if f"{measure}_deviation" in found else {}
                shown = {key: f"{number:.6f}" for key, number in numbers.items()}
                rows.append({**named, "column": column, "measure": measure, **shown})
    return tables.to_csv(rows, CSV)


def title(name: str, arm: dict[str, Any]) -> str:
    """What a row of a table is called."""
    return f"{arm['arch']}, {TASKS.get(arm['task'], arm['task'])}" + ("" if name == "random" else f" ({name})")


def cell_text(arm: dict[str, Any], column: str, measure: str) -> str:
    """What stands in a cell: per cent, half of the interval, and the deviation over seeds where there are several."""
    found = arm["scores"].get(column)
    if not found or measure not in found:
        return "-"
    low, high = found[f"{measure}_interval"]
    deviation = found.get(f"{measure}_deviation")
    spread = "" if deviation is None else f" (seeds {100 * deviation:.1f})"
    value = round(100 * found[measure], 1) + 0.0  # no "-0.0"
    return f"{tables.plus_minus(value, 50 * (high - low))}{spread}"
