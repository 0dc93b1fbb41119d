"""The page as a browser shows it, on a desk, on a phone: its numbers and its layout."""

from __future__ import annotations

import json
import re
from html import escape, unescape
from pathlib import Path

import pytest

from qtorch.record import ReportRecord, SigAnaRecord, SignalRecord

# Writes what it measures into the document, once every picture has its size.
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
  const cut = [...document.querySelectorAll(".cards dd")]
    .filter(e => e.scrollWidth > e.clientWidth);
  const found = {
    beyond: document.documentElement.scrollWidth - innerWidth, overlaps, images, cut: cut.length,
  };
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
FRAME = """<!doctype html><script>
addEventListener("message", e => document.body.setAttribute("data-found", e.data));
</script><body><iframe srcdoc="{page}" style="width:{width}px;height:800px"></iframe></body>"""


@pytest.fixture
def page(model, dataset, recorder, account_walk) -> Path:
    """The page of a run that has everything."""
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
def test_a_browser_shows_the_numbers_of_the_run(page, in_browser, elements, recorder, tmp_path):
    carried = {
        e["data-metric"]: float(e["data-value"])
        for e in elements(in_browser(page))
        if "data-metric" in e
    }
    assert carried == recorder.list_metrics()

    assert page.stat().st_size < 3_000_000
    measured = page.read_text().replace("</body>", MEASURE + "</body>")
    for width, narrow in ((1100, False), (380, True)):
        frame = tmp_path / f"{width}.html"
        frame.write_text(FRAME.format(page=escape(measured), width=width))
        told = re.search(r'<body data-found="([^"]*)"', in_browser(frame))
        assert told, "the page did not load"
        found = json.loads(unescape(told[1]))
        assert found["beyond"] <= 0, "the page is wider than the screen"
        assert found["overlaps"] == found["cut"] == 0
        assert len(found["images"]) == 12
        for natural, shown in found["images"]:
            assert natural == (720 if narrow else 1728)
            assert 0.9 < 2 * shown / natural < 1.1, "letters are not of their own size"
