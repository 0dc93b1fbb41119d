"""Kill a small training by SIGKILL at random moments, and compare it with undisturbed trainings.

    python scripts/kill_study.py [--kills 1000] [--devices 1] [--seed 0] [--folder FOLDER]

The kills fall into all phases of a task: training, validation, checkpoints, saving, records and
predictions; on two devices they hit a rank or the parent of both. Prints how many kills each phase
got, and fails unless every killed training ends as one finished run with the weights, metrics and
scores of the undisturbed one, bit for bit. 1000 kills take about twelve minutes on one core.
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

STEPS = Path(__file__).resolve().parents[1] / "tests" / "e2e"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--folder", help="for the runs; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        start = time.perf_counter()
        report = kill_trainings(folder, args.kills, args.devices, args.seed)
        compare(folder, report)
        print_report(report, time.perf_counter() - start)


def kill_trainings(folder: Path, kills: int, devices: int, seed: int) -> dict[str, object]:
    """Run the trainings and return how often each phase was killed, and the run IDs."""
    words = [str(folder), str(kills), str(devices), str(seed)]
    process = subprocess.run(
        [sys.executable, str(STEPS / "kill_steps.py"), *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if process.returncode:
        raise SystemExit("the study failed: an attempt ended in another way than by its kill.")
    report: dict[str, object] = json.loads(process.stdout.splitlines()[-1])
    return report


def compare(folder: Path, report: dict[str, object]) -> None:
    sys.path.insert(0, str(STEPS))
    from killed_runs import compare_rounds  # type: ignore[import-not-found]

    compare_rounds(folder, report["rounds"])


def print_report(report: dict[str, object], seconds: float) -> None:
    kills, inside, rounds = report["kills"], report["inside"], report["rounds"]
    assert isinstance(kills, dict)
    assert isinstance(inside, dict)
    assert isinstance(rounds, list)
    print("| phase | kills | of these inside the writing of a file |\n|---|---|---|")
    for phase, count in sorted(kills.items(), key=lambda item: -item[1]):
        print(f"| {phase} | {count} | {len(inside.get(phase, []))} |")
    print(
        f"{sum(kills.values())} kills of {len(rounds)} trainings in {seconds:.0f} s: each ended as "
        "one run, equal to the undisturbed one bit for bit."
    )


if __name__ == "__main__":
    main()
