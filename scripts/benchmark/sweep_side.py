"""Benchmark a sweep's job against the same task in a process that is already warm.

    python scripts/benchmark/sweep_side.py [--jobs 8] [--repeats 3]

The task is `debug=tiny`. The time of a job is the difference between a sweep of `--jobs` jobs and
one of 2, divided by the number of additional jobs, which excludes the fixed cost of a sweep
(imports, its own run, the table). Uses the basic launcher, which runs one job after another.
Prints one line of JSON, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

TINY = ("debug=tiny", "log_level=ERROR", "model.network.hidden_size=8")
NUM_BASELINE_JOBS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", nargs="?", default="sweep")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("threads", "provider"):
        parser.add_argument(f"--{name}", help="not used: the market is synthetic")
    parser.add_argument("--work", dest="folder", help="parent of the temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.chdir(folder)
        bare_seconds = measure_bare_runs(args.jobs)
        job_seconds, fixed_seconds = [], []
        for k in range(args.repeats):
            baseline_seconds, sweep_seconds = (
                measure_sweep(Path(folder, f"{k}-{n}"), n) for n in (NUM_BASELINE_JOBS, args.jobs)
            )
            job_seconds.append((sweep_seconds - baseline_seconds) / (args.jobs - NUM_BASELINE_JOBS))
            fixed_seconds.append(baseline_seconds - NUM_BASELINE_JOBS * job_seconds[-1])
    result = {
        "bare": median(bare_seconds),
        "job": median(job_seconds),
        "once": median(fixed_seconds),
    }
    result["overhead"] = result["job"] - result["bare"]
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


def measure_bare_runs(number: int) -> list[float]:
    """Seconds of each training in this process, without the first one, which does the imports."""
    from qtorch.cli.compose import compose_settings, resolve_segments
    from qtorch.core.runtime import configure_logging
    from qtorch.trainer.run import task_train

    configure_logging("ERROR")
    seconds = []
    for seed in range(number + 1):
        start = time.perf_counter()
        task_train(
            resolve_segments(compose_settings("train", [*TINY, f"seed={seed}"])["task"]), "bare"
        )
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure_sweep(folder: Path, number: int) -> float:
    """Wall-clock seconds of the command of a sweep with `number` jobs."""
    folder.mkdir()
    seeds = ",".join(map(str, range(number)))
    command = [sys.executable, "-m", "qtorch.cli.main", "train", "-m", *TINY, f"seed={seeds}"]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
