#!/usr/bin/env bash
# Run lint, type check and tests in a separate virtual environment (.venv-test).
#   bash scripts/test.sh                  everything that this machine can run
#   bash scripts/test.sh -m "not slow"    only the fast suite; accepts any pytest arguments
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # else every process that the tests start would compile all modules
source scripts/environment.sh
make_environment .venv-test "[dev]"

export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 # two threads that compete for a core are slower than one
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true MPLBACKEND=Agg
bin=$PWD/.venv-test/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$bin/mypy" >"$types" 2>&1 & # runs for over a minute on one core, in parallel with the tests
mypy=$! failed=0
"$bin/python" -m pytest -n "${QTORCH_TEST_PROCESSES:-3}" --dist loadgroup --durations=15 "$@" || failed=$?
wait "$mypy" || failed=$?
cat "$types"
exit "$failed"
