"""`qtorch COMMAND ...`: finds the command's file and runs it; imports nothing heavy itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

import qtorch
from qtorch.core.errors import unknown_name

# command -> (module with `main(argv) -> exit code`, one line for --help)
COMMANDS = {
    "train": ("qtorch.cli.train", "train and judge a model; Hydra overrides follow, -m sweeps"),
    "sweep": ("qtorch.cli.sweeps", "what train -m began: list, show NAME, best NAME, resume NAME"),
    "predict": ("qtorch.cli.predict", "scores of a finished run: run=ID segment=test out=FILE"),
    "finetune": (
        "qtorch.cli.finetune",
        "a run's model learns on: run=ID dataset.segments.train=...",
    ),
    "export": ("qtorch.cli.export", "a run's network as a file: run=ID format=onnx out=FILE"),
    "report": ("qtorch.cli.report", "a run as a page, or several compared: runs=[ID,...]"),
    "replay": ("qtorch.cli.replay", "a finished run once more: do the numbers agree? run=ID"),
    "rolling": ("qtorch.cli.rolling", "train again and again through time: model=gru step=40"),
    "worker": ("qtorch.cli.worker", "train the tasks of a pool: pool=NAME url=... devices=..."),
    "tasks": ("qtorch.cli.tasks", "a pool's tasks: list, stat, show, wait, retry, remove, ..."),
    "data": (
        "qtorch.cli.data",
        "import: to Qlib's layout; describe: a source; cache: kept features",
    ),
    "tracking": ("qtorch.cli.tracking", "send: deliver what an unreachable server did not get"),
}

# Under torchrun and srun the other ranks' commands train along, and do nothing else.
SHARED = ("train", "finetune")

HELP = """\
qtorch: deep learning for stock research on PyTorch Lightning, Hydra and MLflow

usage: qtorch COMMAND [--debug] ...

{commands}

  qtorch COMMAND --help     what a command takes
  qtorch --version          the version

first steps
  qtorch train                                       an LSTM on the embedded synthetic market
  qtorch train model=gru trainer.max_epochs=5        other parts, other settings
  qtorch train -m model=lstm,gru seed=0,1,2          a sweep, each job its own run
  qtorch train data=qlib data.provider_uri=~/qlib_data universe=nyse500
  qtorch predict run=RUN_ID segment=test out=scores.parquet
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 misused, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items())
        print(HELP.format(commands=listing))
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"qtorch {qtorch.__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"error: {unknown_name('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    from qtorch.cli.guard import guarded

    def command(argv: Sequence[str]) -> int:
        code: int = importlib.import_module(COMMANDS[name][0]).main(argv)
        return code

    if name in SHARED:
        return _shared(lambda: guarded(command, rest))
    return guarded(command, rest)


def _shared(work: Callable[[], int]) -> int:
    """The work, once, where torchrun or srun has started this command for each rank."""
    from qtorch.core.launch import external_world

    world = external_world()
    if world is None:
        return work()
    from qtorch.model.external import hosting, serve

    if world.rank > 0:
        return serve(world)
    with hosting(world) as outcome:
        outcome["code"] = work()
    return outcome["code"]


if __name__ == "__main__":
    sys.exit(main())
