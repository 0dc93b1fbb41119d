"""Ask Qlib's exchange about quotes; needs a Python with pyqlib.

    python qlib_quotes.py JOB.json OUT.json

JOB: provider, names, days.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pandas as pd
import qlib
from quote_cases import EXCHANGES, answer_all


def main(job_path: str, out: str) -> None:
    """Write the answers."""
    job = json.loads(Path(job_path).read_text())
    qlib.init(provider_uri=job["provider"], region="us", kernels=1, logging_level=50)
    from qlib.backtest.decision import OrderDir
    from qlib.backtest.exchange import Exchange

    names, sides = job["names"], (OrderDir.SELL, OrderDir.BUY)
    days = [pd.Timestamp(day) for day in job["days"]]
    answers = [
        answer_all(Exchange(codes=names, **settings), names, days, sides) for settings in EXCHANGES
    ]
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
