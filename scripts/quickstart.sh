#!/usr/bin/env bash
# From a fresh clone to a trained and evaluated network: creates .venv, installs qtorch, and runs the
# main job on the synthetic market. Arguments are overrides:
#   bash scripts/quickstart.sh model=gru seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv "[sweep]"
.venv/bin/qtorch train "$@"
echo "to use the commands qtorch and mlflow: source .venv/bin/activate" >&2
