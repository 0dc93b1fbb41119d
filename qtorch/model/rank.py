"""A rank: one process of a training on several devices.

Started as `python -m qtorch.model.rank FOLDER DIGEST RANK LOCAL_RANK REPLIES`: the folder that
holds the request, the request's hash, this process's place, and the file descriptor that takes
its replies. It trains its share and ends; recorder, prediction and records are its parent's.
"""

from __future__ import annotations

import os
import sys

from qtorch.model.rank_link import RankLink, told


def main(argv: list[str]) -> int:
    """Serve one request; the exit code is 0 where it came to an end that the parent knows of."""
    link = RankLink(int(argv[4]))
    link.listen()  # before the imports, which take longest
    return serve(link, argv)


def serve(link: RankLink, argv: list[str]) -> int:
    """What a rank does once its link listens."""
    try:
        from qtorch.model.rank_training import train_rank

        train_rank(link, argv[0], argv[1], int(argv[2]), int(argv[3]))
    except BaseException as error:
        link.say(error=told(error))
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # what is left of process groups is torn down by the system, at once
