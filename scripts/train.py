"""Run `qtorch train` without the installed command: python scripts/train.py model=gru seed=1"""

from __future__ import annotations

import sys

from qtorch.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
