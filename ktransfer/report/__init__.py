"""What people would rather look at than read: one page about a run, in one file."""

from typing import TYPE_CHECKING

from ktransfer.lazy import exports

if TYPE_CHECKING:
    from ktransfer.report.config import ReportConfig
    from ktransfer.report.stage import report

__all__ = ["ReportConfig", "report"]
__getattr__ = exports(__name__, {"report": "stage", "ReportConfig": "config"})
