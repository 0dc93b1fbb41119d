"""Write the data of real Qlib's notebook graphs as JSON; run by a Python with pyqlib.

    $QTORCH_QLIB_PYTHON scripts/parity/qlib_graphs.py tests/golden/qlib_graphs.json

That Python needs pandas before 3.0 and plotly before 7.0 too, which the graphs of Qlib 0.9.7 need,
and statsmodels. A function of plotly, and the months of pandas, have gone since.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from graph_cases import draw_all, figure_data, inputs
from qlib.backtest.position import Position
from qlib.contrib.evaluate import risk_analysis
from qlib.contrib.report import analysis_model, analysis_position


def qlib_positions() -> dict[Any, Position]:
    """Return the positions as Qlib has them."""
    frame = inputs()[2]
    return {
        date: Position(0.0, {name: dict(row) for name, row in day.droplevel(0).iterrows()})
        for date, day in frame.groupby(level=0)
    }


def main(path: str) -> None:
    """Write the data of all figures, one a line."""
    graphs = draw_all(analysis_model, analysis_position, qlib_positions(), risk_analysis)
    lines = [
        f" {json.dumps(f'{name}/{number}')}: {json.dumps(figure_data(figure))}"
        for name, figures in graphs.items()
        for number, figure in enumerate(figures)
    ]
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
