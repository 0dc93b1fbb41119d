"""The entry point of a rank: one process of a training on several devices.

It is started as `python -m qtorch.model.devices.rank FOLDER DIGEST RANK LOCAL_RANK REPLIES`,
with the folder that holds the request, the request's hash, the rank and local rank of this
process, and the file descriptor for its messages. It trains its share of each batch and exits.
Recorder, prediction and records belong to its parent process.
"""

from __future__ import annotations

import os
import sys

from qtorch.model.devices.rank_link import RankLink, serialize_error


def main(argv: list[str]) -> int:
    """Serve one request; return 0 if it ended in a way that the parent was told about."""
    link = RankLink(int(argv[4]))
    link.listen()  # before the slow imports
    return run_rank(link, argv)


def run_rank(link: RankLink, argv: list[str]) -> int:
    """Run a rank whose link is listening, and return its exit code."""
    try:
        from qtorch.model.devices.rank_training import train_rank

        train_rank(link, argv[0], argv[1], int(argv[2]), int(argv[3]))
    except BaseException as error:
        link.send(error=serialize_error(error))
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # skip the teardown of process groups; the system does it at once
