"""Print Qlib's results for the rolling cases as JSON; needs a Python with pyqlib."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import qlib
from rolling_cases import CALENDAR, build_task, flatten, rolling_cases, scores, task_windows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("calendars", "instruments", "features"):
            Path(folder, name).mkdir()
        days = "".join(f"{day:%Y-%m-%d}\n" for day in CALENDAR)
        Path(folder, "calendars", "day.txt").write_text(days)
        qlib.init(provider_uri=folder, region="us", logging_level=40)
        from qlib.model.ens.ensemble import AverageEnsemble, RollingEnsemble
        from qlib.model.ens.group import RollingGroup
        from qlib.workflow.task.gen import MultiHorizonGenBase, RollingGen

        class Horizons(MultiHorizonGenBase):
            def set_horizon(self, task: dict[str, Any], hr: int) -> None:
                task["horizon"] = hr

        rolling_results = {}
        for name, case in rolling_cases().items():
            generator = RollingGen(
                case["step"], case["rtype"], trunc_days=case["trunc_days"] or None
            )
            try:
                windows = task_windows(generator(build_task(case["segments"], case["end_time"])))
            except Exception as error:
                windows = [{"error": type(error).__name__}]
            rolling_results[name] = windows
        case = rolling_cases()[next(iter(rolling_results))]
        horizons = Horizons([1, 5, 20], label_leak_n=2)(build_task(case["segments"], None))
        frames = scores()
        print(
            json.dumps(
                {
                    "rolling": rolling_results,
                    "horizons": task_windows(horizons),
                    "stitched": flatten(RollingGroup()(frames)[("lstm",)]),
                    "rolling ensemble": flatten(RollingEnsemble()(frames)),
                    "average": flatten(AverageEnsemble()({"a": frames, "b": {"c": frames}})),
                },
                indent=None,
            )
        )


if __name__ == "__main__":
    main()
