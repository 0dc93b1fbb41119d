#!/usr/bin/env bash
# From a fresh clone to a trained and judged network: makes .venv, installs qtorch, runs the main
# job on the embedded market. Arguments are overrides: bash scripts/quickstart.sh model=gru seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv "[sweep]"
.venv/bin/qtorch train "$@"
echo "qtorch and mlflow are commands after: source .venv/bin/activate" >&2
