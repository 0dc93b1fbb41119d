"""Run Qlib's PortAnaRecord on stored scores; needs a Python with pyqlib.

    python qlib_portfolio_record.py JOB.json

JOB: provider, scores (a pickle), config, folder. Prints the logged metrics as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import qlib


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    store = {
        "class": "MLflowExpManager",
        "module_path": "qlib.workflow.expm",
        "kwargs": {"uri": f"sqlite:///{job['folder']}/runs.db", "default_exp_name": "parity"},
    }
    qlib.init(provider_uri=job["provider"], region="us", exp_manager=store, logging_level=50)
    from qlib.workflow import R
    from qlib.workflow.record_temp import PortAnaRecord

    scores = pd.read_pickle(job["scores"]).to_frame("score")
    config = job["config"]
    config["strategy"] |= {"module_path": "qlib.contrib.strategy"}
    with R.start(experiment_name="parity"):
        R.save_objects(**{"pred.pkl": scores, "label.pkl": scores})
        recorder = R.get_recorder()
        PortAnaRecord(recorder, config).generate()
        print(json.dumps(recorder.list_metrics()))


if __name__ == "__main__":
    main()
