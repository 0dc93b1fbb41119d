#!/usr/bin/env bash
# Run lint, type check and tests in a separate virtual environment (.venv-test).
#   bash scripts/test.sh                  everything that this machine can run
#   bash scripts/test.sh -m "not slow"    only the fast suite; accepts any pytest arguments
# Without arguments it also makes .venv-qlib, for the comparisons with real Qlib. QTORCH_QLIB_PYTHON
# names another Python with pyqlib, QTORCH_TEST_DATA a folder with real bars.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # else every process that the tests start would compile all modules
source scripts/environment.sh

qlib='' mypy='' output=$(mktemp -d)
stop() {
    # A background command ignores Ctrl-C. The installation is a process group (`set -m`).
    [ -z "$qlib" ] || kill -- "-$qlib" 2>/dev/null || true
    [ -z "$mypy" ] || kill "$mypy" 2>/dev/null || true
    rm -rf "$output"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

make_environment .venv-test "[dev]"
if [ -n "${QTORCH_QLIB_PYTHON:-}" ]; then
    : # the caller's choice
elif [ $# = 0 ]; then
    set -m
    make_qlib_environment .venv-qlib .venv-test </dev/null >"$output/qlib" 2>&1 &
    set +m
    qlib=$!
elif has_qlib_environment .venv-qlib .venv-test; then
    export QTORCH_QLIB_PYTHON=$PWD/.venv-qlib/bin/python
fi

export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 # two threads that compete for a core are slower than one
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true MPLBACKEND=Agg
bin=$PWD/.venv-test/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy" >"$output/types" 2>&1 & # runs for over a minute on one core, in parallel with the tests
mypy=$!
"$bin/python" -c 'import qtorch.trainer.preload' # else every test process compiles its modules
if [ -n "$qlib" ]; then
    if wait "$qlib"; then
        export QTORCH_QLIB_PYTHON=$PWD/.venv-qlib/bin/python
    else
        reason="pyqlib $QLIB_VERSION cannot be installed: $(grep ERROR "$output/qlib" | tail -1 || true)"
        echo "comparisons with Qlib are skipped: $reason" >&2
        export QTORCH_QLIB_MISSING=$reason
    fi
    qlib=''
fi
failed=0
processes=3 # each reads all tests first
[ $# != 0 ] || processes=5 # many of all tests wait for other processes
"$bin/python" -m pytest -n "${QTORCH_TEST_PROCESSES:-$processes}" --dist loadgroup --durations=15 "$@" || failed=$?
wait "$mypy" || failed=$?
mypy=''
cat "$output/types"
exit "$failed"
