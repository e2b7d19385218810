"""The settings of `ktransfer report`."""

from dataclasses import dataclass
from typing import ClassVar

from ktransfer.config import option


@dataclass(frozen=True)
class ReportConfig:
    """Write one page about the run: what was done, curves, every cluster with its images, evaluations.

    The page is one file, which needs no network. It may be written while another stage of the run works.
    """

    first: ClassVar = ("data", "beside", "names", "megabytes", "serve")

    data: str | None = option(
        None, "images behind the clusters; if not given, those that were clustered", execution=True
    )
    beside: str | None = option(
        None, "further runs, separated by commas, whose curves and results are shown beside", execution=True
    )
    names: str | None = option(
        None,
        "names of clusters, as the page saves them; if not given, report/names.csv of the run, if there is one",
        execution=True,
    )
    megabytes: int = option(28, "largest size of the page; images are made smaller, and fewer, to fit", low=2, high=500)
    serve: bool = option(
        False, "show the page behind a server on this machine, with all images, until Ctrl-C", execution=True
    )
    port: int = option(0, "port of --serve; 0: any that is free", low=0, high=65535, execution=True)
    overwrite: bool = option(False, "make the page again, though nothing changed", execution=True)
