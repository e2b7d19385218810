"""The report stage: what a run holds as one page, which a browser opens without network or server."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ktransfer import files
from ktransfer.artifacts.names import read_names
from ktransfer.config import build
from ktransfer.data.dataset import Dataset
from ktransfer.data.opening import open_dataset
from ktransfer.errors import UsageError
from ktransfer.plan import Plan, PlannedStep
from ktransfer.progress import say
from ktransfer.report.config import ReportConfig
from ktransfer.run import begin, changes, input_hash, read_record, records
from ktransfer.stages import STAGES

REPORT = "report"
PAGE = "index.html"
NAMES = "names.csv"
READ = ("stage.json", "metrics.jsonl", "quality.json", "*.h5", "*.md", "*.json", "*.png")


@dataclass(frozen=True, kw_only=True)
class ReportPlan(Plan):
    """What the stage will do: `beside` are the other runs, `names` the file of names, which may not be there."""

    config: ReportConfig
    beside: tuple[Path, ...] = ()
    names: Path | None = None


def report(run: str | Path, **options: Any) -> Path:
    """Write `run/report/index.html`, one page about the run; the same run gives the same bytes.

    Args:
        run: the run folder.
        options: the fields of `ReportConfig`.

    Returns:
        The path of the page.

    Raises:
        UsageError, StageError: one line each.
    """
    return carry_out(check(Path(run), options))


def carry_out(plan: ReportPlan) -> Path:
    """Read what the runs hold, and write the page."""
    from ktransfer.report.page import make_page

    config, images = plan.config, _images(plan)
    inputs = _inputs(plan) | ({"data": images.fingerprint} if images else {})
    again = plan.overwrite or bool(changes(plan.run, REPORT, REPORT, config, inputs))
    with begin(plan.run, REPORT, REPORT, config, inputs, [PAGE], again, "cpu", aside=True) as step:
        path = step.folder / PAGE
        if not step.done:
            names = read_names(plan.names) if plan.names else None
            page = make_page(plan.run, plan.beside, images, names, config.megabytes * 10**6)
            files.write_text(path, page)
            step.finish([path], result={"bytes": path.stat().st_size})
            say(f"report: done; {path.stat().st_size / 1e6:.1f} MB; {path}")
    if config.serve:
        _serve(plan, path, images)
    return path


def _serve(plan: ReportPlan, page: Path, images: Dataset | None) -> None:
    """Until Ctrl-C."""
    from ktransfer.report.atlas import clusters_of
    from ktransfer.report.server import Served, open_server

    found = clusters_of(plan.run)
    same = images is not None and found is not None and images.fingerprint == found.assignment.fingerprint
    served = Served(
        page,
        images if same else None,
        found.assignment if found else None,
        found.members if found else [],
        plan.run / REPORT / NAMES,
    )
    server, address = open_server(served, plan.config.port)
    say(f"report: open {address} in a browser of this machine; Ctrl-C ends it")
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def check(run: Path, options: dict[str, Any], before: Sequence[Plan] = ()) -> ReportPlan:
    """Everything that can be found wrong before the work.

    Raises:
        UsageError: one line for what is wrong.
    """
    config = build(ReportConfig, options, REPORT)
    if find_spec("vl_convert") is None:
        raise UsageError("report: vl-convert-python is not installed; pip install 'ktransfer[report]'")
    beside = tuple(Path(one) for one in (config.beside or "").split(",") if one)
    for one in (*(() if before else (run,)), *beside):
        if not any(records(one / row.folder) for stage, row in STAGES.items() if stage != REPORT):
            flag = "--beside" if one in beside else "--run"
            raise UsageError(f"{flag} {one}: holds no stage of a run; name the folder that --run had")
    names = Path(config.names) if config.names else run / REPORT / NAMES
    if config.names:
        read_names(names)
    if config.data:
        open_dataset(config.data)
    plan = partial(
        ReportPlan,
        stage=REPORT,
        run=run,
        overwrite=config.overwrite,
        config=config,
        beside=beside,
        names=names if names.is_file() else None,
    )
    inputs = {} if before else _inputs(plan())
    reads = tuple(dict.fromkeys(one.stage for one in before))
    return plan(steps=[PlannedStep(REPORT, config, inputs, reads, cheap=True)])


def _inputs(plan: ReportPlan) -> dict[str, str]:
    """Name -> SHA-256 of what the page is made of. Of features and weights, the record beside them has the hash."""
    found: dict[str, str] = {}
    for run in (plan.run, *plan.beside):
        for folder in sorted({row.folder for row in STAGES.values()} - {REPORT}):
            here = run / folder
            paths = {
                path for kind in READ for path in here.rglob(kind) if not (kind == "*.h5" and folder == "features")
            }
            for path in sorted(paths):
                if path.is_file() and not any(part.startswith((".", "work")) for part in path.relative_to(run).parts):
                    found[f"{run.name}/{path.relative_to(run).as_posix()}"] = input_hash(path)
    return found | ({"names": input_hash(plan.names)} if plan.names else {})


def _images(plan: ReportPlan) -> Dataset | None:
    """Those that have labels, None where they cannot be had: a line says why."""
    made = [read_record(plan.run, "clusters", step) for step in ("assign", "cluster")]
    specs = [plan.config.data, *(record["config"].get("data") for record in made if record)]
    spec = next((one for one in specs if one), None)
    if spec is None:
        if any(made):
            say("report: no images: it is not known which ones were clustered; name them with --data")
        return None
    try:
        return open_dataset(spec)
    except UsageError as error:
        if plan.config.data:
            raise
        say(f"report: no images: {error}")
        return None
