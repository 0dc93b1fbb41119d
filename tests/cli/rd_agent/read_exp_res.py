from pathlib import Path

import pandas as pd
import qlib

qlib.init()

from qlib.workflow import R  # noqa: E402 - after init, as in Qlib's scripts

latest = None
for experiment in R.list_experiments():
    for recorder_id in R.list_recorders(experiment_name=experiment):
        recorder = R.get_recorder(recorder_id=recorder_id, experiment_name=experiment)
        end_time = recorder.info["end_time"]
        if end_time is not None and (latest is None or end_time > latest.info["end_time"]):
            latest = recorder

if latest is None:
    print("No recorders found")
else:
    print(f"Latest recorder: {latest}")
    folder = Path(__file__).resolve().parent
    pd.Series(latest.list_metrics()).to_csv(folder / "qlib_res.csv")
    report = latest.load_object("portfolio_analysis/report_normal_1day.pkl")
    report.to_pickle(folder / "ret.pkl")
    print(f"Output has been saved to {folder}")
