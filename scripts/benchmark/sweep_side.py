"""What a job costs in a sweep beside the same task in a process that has its imports done.

    python scripts/benchmark/sweep_side.py [--jobs 8] [--repeats 3]

The task is the tiny one (`debug=tiny`). A sweep's job: the difference between a sweep of `--jobs`
and one of 2, by the jobs between, so that what a sweep costs once (imports, its run, the table)
stays out; with the basic launcher, one job after another. Prints one line of JSON in seconds.
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
FEW = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", nargs="?", default="sweep")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("threads", "provider"):
        parser.add_argument(f"--{name}", help="not used: the market is made")
    parser.add_argument("--work", dest="folder", help="where the stores' folders are made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.chdir(folder)
        bare = bare_runs(args.jobs)
        jobs, once = [], []
        for k in range(args.repeats):
            few, many = (swept(Path(folder, f"{k}-{n}"), n) for n in (FEW, args.jobs))
            jobs.append((many - few) / (args.jobs - FEW))
            once.append(few - FEW * jobs[-1])
    told = {"bare": median(bare), "job": median(jobs), "once": median(once)}
    told["overhead"] = told["job"] - told["bare"]
    print(json.dumps({name: round(value, 3) for name, value in told.items()}))


def bare_runs(number: int) -> list[float]:
    """Seconds of each training in this process; the first one, which imports, is left out."""
    from qtorch.cli.compose import composed
    from qtorch.cli.segments import with_dates
    from qtorch.core.runtime import configure_logging
    from qtorch.trainer.run import task_train

    configure_logging("ERROR")
    seconds = []
    for seed in range(number + 1):
        begin = time.perf_counter()
        task_train(with_dates(composed("train", [*TINY, f"seed={seed}"])["task"]), "bare")
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def swept(folder: Path, number: int) -> float:
    """Seconds of a sweep of so many jobs, from the shell's point of view."""
    folder.mkdir()
    seeds = ",".join(map(str, range(number)))
    command = [sys.executable, "-m", "qtorch.cli.main", "train", "-m", *TINY, f"seed={seeds}"]
    begin = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
