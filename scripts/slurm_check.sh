#!/usr/bin/env bash
# qtorch on a real SLURM: a private cluster of two nodes on this machine, started and stopped here.
#   bash scripts/slurm_check.sh                       on a market made for it
#   bash scripts/slurm_check.sh FOLDER                on bars in Qlib's layout (universe nyse500)
# A sweep loses a job to scancel and a node to kill -9 and is resumed; two processes train one
# network by srun; workers of a pool run as an array; a job gives its time back and goes on.
# Prints a table; the exit code is 0 where all of it held. `--only page` runs every command of
# from_laptop_to_cluster.md instead. SLURM comes from Debian's packages where it is missing, which
# takes root. QTORCH_PYTHON names a Python with qtorch to use.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v slurmctld >/dev/null 2>&1; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        echo "SLURM is not installed (slurmctld is missing), and only root can install it." >&2
        exit 77
    fi
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        --no-install-recommends slurm-wlm slurmctld slurmd; } >&2 || exit 77
fi
if [ -z "${QTORCH_PYTHON:-}" ]; then
    source scripts/environment.sh
    # The page has commands for Ray too.
    case " $* " in *page*) make_environment .venv "[sweep,ray]" ;; *) make_environment .venv "[sweep]" ;; esac
    QTORCH_PYTHON=$PWD/.venv/bin/python
fi
exec "$QTORCH_PYTHON" scripts/slurm/check.py "$@"
