"""The report of a probe as an HTML page."""

from __future__ import annotations

from pathlib import Path

from qtorch.record.report.page import Page
from qtorch.study.leakage.report import ProbeReport

TEMPLATE = "probe.html.j2"


def write_page(report: ProbeReport, path: Path) -> Path:
    """Write a report as a page that needs no network; return its path."""
    facts = {
        "Result": report.summary(),
        "Changes after": ", ".join(f"{date:%Y-%m-%d}" for date in report.dates),
        "Changes": ", ".join(report.methods),
        **{name.capitalize(): text for name, text in report.facts.items()},
    }
    values = {"title": "Probe for leaks of the future", "facts": facts, "lines": report.lines}
    return Page(path.parent).write(path.name, TEMPLATE, **values)
