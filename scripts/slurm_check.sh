#!/usr/bin/env bash
# Check qtorch on a real SLURM: a private cluster of two nodes that runs on this machine.
#   bash scripts/slurm_check.sh                       with a synthetic market
#   bash scripts/slurm_check.sh FOLDER                with bars in Qlib's layout (universe nyse500)
# A sweep loses a job to scancel and a node to kill -9, and is resumed; two processes train one
# network with srun; pool workers run as a job array; a job is requeued and resumes its run.
# Prints a table; the exit code is 0 if all checks passed. `--only page` runs every command of
# docs/sweeps-and-clusters.md instead. If SLURM is missing, it is installed from Debian's packages,
# which needs root. QTORCH_PYTHON is the path of a Python with qtorch (default: create .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v slurmctld >/dev/null 2>&1; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        echo "SLURM is not installed (no slurmctld), and installing it needs root on Debian." >&2
        exit 77
    fi
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        --no-install-recommends slurm-wlm slurmctld slurmd; } >&2 || exit 77
fi
if [ -z "${QTORCH_PYTHON:-}" ]; then
    source scripts/environment.sh
    # The page also has commands for Ray.
    case " $* " in *page*) make_environment .venv "[sweep,ray]" ;; *) make_environment .venv "[sweep]" ;; esac
    QTORCH_PYTHON=$PWD/.venv/bin/python
fi
exec "$QTORCH_PYTHON" scripts/slurm/check.py "$@"
