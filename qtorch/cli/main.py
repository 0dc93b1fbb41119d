"""The `qtorch` entry point: dispatches to the command's module and imports nothing heavy itself."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

import qtorch
from qtorch.core.errors import unknown_name_message

# command -> (module with `main(argv) -> exit code`, one line for --help)
COMMANDS = {
    "new": ("qtorch.cli.setup.new", "write a small project with a network of your own: new study/"),
    "train": ("qtorch.cli.train", "train and evaluate a model; Hydra overrides, -m for a sweep"),
    "run": (
        "qtorch.cli.workflow.command",
        "train a workflow file in Qlib's format: FILE.yaml task.model.kwargs.n_epochs=1",
    ),
    "sweep": ("qtorch.cli.sweep", "sweeps of train -m: list, show NAME, best NAME, resume NAME"),
    "runs": ("qtorch.cli.runs", "list the runs of the tracking store; filter them, choose columns"),
    "predict": ("qtorch.cli.predict", "scores of a finished run: run=ID segment=test out=FILE"),
    "finetune": (
        "qtorch.cli.finetune",
        "fine-tune the model of a run: run=ID dataset.segments.train=...",
    ),
    "export": ("qtorch.cli.export", "export the network of a run: run=ID format=onnx out=FILE"),
    "report": ("qtorch.cli.report", "HTML report of a run, or a comparison: runs=[ID,...]"),
    "replay": ("qtorch.cli.replay", "repeat a finished run and compare the results: run=ID"),
    "probe": ("qtorch.cli.probe", "look for leaks of the future: of a configuration, or run=ID"),
    "rolling": ("qtorch.cli.rolling", "rolling retraining and evaluation: model=gru step=40"),
    "worker": ("qtorch.cli.worker", "train tasks from a task pool: pool=NAME url=... devices=..."),
    "tasks": ("qtorch.cli.tasks", "manage a task pool: list, stat, show, wait, retry, remove, ..."),
    "data": (
        "qtorch.cli.data",
        "import data into Qlib's format, describe a source, manage the cache",
    ),
    "tracking": ("qtorch.cli.tracking", "send: deliver data that a server has not received"),
    "completion": (
        "qtorch.cli.setup.completion",
        "complete commands and settings by Tab",
    ),
}

# Without arguments these commands show their help.
ACTION_COMMANDS = ("new", "completion", "sweep", "worker", "tasks", "data", "tracking")
# torchrun and srun start these commands on every rank: rank 0 runs the command, the other ranks
# only take part in its trainings.
RANK_COMMANDS = ("train", "run", "finetune")

HELP_OPTIONS = ("-h", "--help")
HELP = """\
qtorch: deep learning for stock research on PyTorch Lightning, Hydra and MLflow

usage: qtorch COMMAND [--debug] [trusted_pickle=true] ...

{commands}

  qtorch COMMAND --help     show the options of a command
  --debug                   show the traceback of an error
  trusted_pickle=true       load pickles, which run the code that their author put into them
  qtorch --version          show the version

examples
  qtorch train                                       LSTM on the built-in synthetic market
  qtorch train model=gru trainer.max_epochs=5        another model and setting
  qtorch train -m model=lstm,gru seed=0,1,2          a sweep with one run per job
  qtorch train data=qlib data.provider_uri=~/qlib_data universe=nyse500
  qtorch predict run=RUN_ID segment=test out=scores.parquet
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 on success, 1 on failure, 2 on wrong usage, 130 if interrupted.

    Without `argv` it is the command of this process, which finds modules of the working folder.
    """
    if argv is None:
        _add_working_folder()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in (*HELP_OPTIONS, "help"):
        listing = "\n".join(
            f"  {name:<10} {description}" for name, (_, description) in COMMANDS.items()
        )
        print(HELP.format(commands=listing))
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"qtorch {qtorch.__version__}")
        return 0
    name, *command_arguments = arguments
    if name == "--debug" and command_arguments:  # it may stand before the command, too
        name, *command_arguments = [*command_arguments, name]
    if name not in COMMANDS:
        print(f"error: {unknown_name_message('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    from qtorch.cli.guard import run_command

    work = partial(run_command, partial(_dispatch, name), command_arguments)
    return _run_on_rank_zero(work) if name in RANK_COMMANDS else work()


def _add_working_folder() -> None:
    """Put the working folder first on `sys.path`, as `python -m` does; child processes inherit it.

    Python's own switch (`-P`, PYTHONSAFEPATH) leaves it out.
    """
    folder = os.getcwd()
    if not sys.flags.safe_path and sys.path[:1] != [folder]:
        sys.path.insert(0, folder)


def _dispatch(name: str, argv: Sequence[str]) -> int:
    """Import the command's module and run it, or show its help."""
    from qtorch.core.lazy import quick_imports

    with quick_imports(freeze=True):
        module = importlib.import_module(COMMANDS[name][0])
    usage = getattr(module, "USAGE", None)  # None for `train`, whose help comes from Hydra
    asks_for_help = any(a in HELP_OPTIONS for a in argv)
    if usage is not None and (asks_for_help or (not argv and name in ACTION_COMMANDS)):
        print(usage)
        return 0 if argv else 2
    code: int = module.main(argv)
    return code


def _run_on_rank_zero(work: Callable[[], int]) -> int:
    """Run the command on rank 0 if torchrun or srun started it on every rank.

    The other ranks only serve rank 0's trainings.
    """
    from qtorch.process.launch import external_world

    world = external_world()
    if world is None:
        return work()
    from qtorch.model.devices.launcher import host_ranks, serve_ranks

    if world.rank > 0:
        return serve_ranks(world)
    with host_ranks(world) as outcome:
        outcome["code"] = work()
    return outcome["code"]


if __name__ == "__main__":
    sys.exit(main())
