"""The report page in a browser, on a desktop and on a phone: numbers and layout."""

from __future__ import annotations

import json
import re
from html import escape, unescape
from pathlib import Path

import pytest

from qtorch.record import ReportRecord, SigAnaRecord, SignalRecord

# Measures the layout after all images are loaded, and writes the result into the document.
MEASURE = """
<script>
addEventListener("load", () => {
  const all = [...document.querySelectorAll("h1, h2, p, figure, .scroll, .cards, .facts")];
  const boxes = all.filter(e => !e.closest("details") && !e.parentElement.closest(".scroll"))
    .map(e => e.getBoundingClientRect()).filter(r => r.height);
  let overlaps = 0;
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 1 && y > 1) overlaps++;
  }));
  const images = [...document.images].map(i => [i.naturalWidth, i.width]);
  const truncated = [...document.querySelectorAll(".cards dd")]
    .filter(e => e.scrollWidth > e.clientWidth);
  const result = {
    overflow: document.documentElement.scrollWidth - innerWidth, overlaps, images,
    truncated: truncated.length,
  };
  document.documentElement.setAttribute("data-result", JSON.stringify(result));
  parent.postMessage(JSON.stringify(result), "*");
});
</script>
"""
FRAME = """<!doctype html><script>
addEventListener("message", e => document.body.setAttribute("data-result", e.data));
</script><body><iframe srcdoc="{page}" style="width:{width}px;height:800px"></iframe></body>"""


@pytest.fixture
def page(model, dataset, recorder, account_walk) -> Path:
    """The report page of a run with all records."""
    recorder.log_params(**{"model.network._target_": "qtorch.nn.LSTM", "seed": 3})
    for epoch in range(4):
        recorder.log_batch({"train/loss": 1 / (epoch + 1), "valid/ic": 0.01 * epoch}, step=epoch)
    SignalRecord(model, dataset, recorder).generate()
    SigAnaRecord(recorder, ana_long_short=True).generate()
    report, positions = account_walk(num_days=40)
    names = {"report_normal_1day.pkl": report, "positions_normal_1day.pkl": positions}
    recorder.save_objects(artifact_path="portfolio_analysis", **names)
    ReportRecord(recorder).generate()
    return Path(recorder.download_artifact("report/report.html"))


@pytest.mark.slow
def test_browser_shows_the_numbers_of_the_run(page, browser_dom, elements, recorder, tmp_path):
    page_metrics = {
        e["data-metric"]: float(e["data-value"])
        for e in elements(browser_dom(page))
        if "data-metric" in e
    }
    assert page_metrics == recorder.list_metrics()

    assert page.stat().st_size < 3_000_000
    instrumented_page = page.read_text().replace("</body>", MEASURE + "</body>")
    for width, narrow in ((1100, False), (380, True)):
        frame = tmp_path / f"{width}.html"
        frame.write_text(FRAME.format(page=escape(instrumented_page), width=width))
        match = re.search(r'<body data-result="([^"]*)"', browser_dom(frame))
        assert match, "the page did not load"
        measurements = json.loads(unescape(match[1]))
        assert measurements["overflow"] <= 0, "the page is wider than the screen"
        assert measurements["overlaps"] == measurements["truncated"] == 0
        assert len(measurements["images"]) == 12
        for natural, width_on_page in measurements["images"]:
            assert natural == (720 if narrow else 1728)
            assert 0.9 < 2 * width_on_page / natural < 1.1, "the chart is scaled"
