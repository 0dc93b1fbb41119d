"""Templates like those by which Microsoft's RD-Agent drives Qlib, rebuilt in `rd_agent/`.

They are jinja2 templates filled from the environment, with the user's network in `model.py`, a
Parquet file of features beside expressions, and a script that reads the newest run through Qlib's
`R`.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from forked_process import ForkedProcess, fork_servers_in_place

from qtorch.cli.main import main
from qtorch.data import QlibSource

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from qlib_workflows import write_market  # noqa: E402

TEMPLATES = Path(__file__).parent / "rd_agent"
NETWORK = {
    "n_epochs": "1",
    "lr": "2e-3",
    "early_stop": "10",
    "batch_size": "256",
    "weight_decay": "0.0001",
    "num_features": "6",
}
WINDOWS = {"dataset_cls": "TSDatasetH", "step_len": "5", "num_timesteps": "5"}
COMPAT = "import qtorch.compat.qlib as qlib_names\nqlib_names.install()\n"
METRICS = (
    "IC",
    "ICIR",
    "Rank IC",
    "Rank ICIR",
    "1day.excess_return_without_cost.annualized_return",
    "1day.excess_return_without_cost.information_ratio",
    "1day.excess_return_without_cost.max_drawdown",
    "1day.excess_return_with_cost.annualized_return",
)


@pytest.fixture
def folder(tmp_path):
    write_market(tmp_path, num_instruments=12)
    for path in TEMPLATES.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    bars = QlibSource(tmp_path / "cn_data").load().to_frame()
    close = bars["close"].loc[:"2010"].groupby(level="instrument")
    columns = {"momentum_10d": close.pct_change(10), "reversal_1d": -close.pct_change(1)}
    factors = pd.concat({"feature": pd.DataFrame(columns)}, axis=1)
    factors.to_parquet(tmp_path / "combined_factors_df.parquet")
    return tmp_path


def run(folder: Path, *words: str, **variables: str) -> str:
    """Run Python in the folder, whose modules it finds, and return what it prints."""
    paths = os.pathsep.join(["./", str(ROOT)])
    process = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **variables, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout + process.stderr


def fork_python(folder: Path, *words: str, **variables: str) -> str:
    """As `run`, in a process that is forked from this one and so has its imports."""
    path = folder / "output.txt"

    def work() -> int:
        with path.open("w") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # to the end
        sys.stderr = sys.stdout
        os.chdir(folder)
        os.environ.update({**variables, "OMP_NUM_THREADS": "1"})
        sys.path.insert(0, str(folder))
        fork_servers_in_place()
        if words[0] == "-m":
            return main(words[2:])
        runpy.run_path(words[0], run_name="__main__")
        return 0

    code = ForkedProcess(work).wait(300)
    text = path.read_text()
    assert code == 0, text[-3000:]
    return text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workflow", "module", "variables", "network"),
    [
        ("factors.yaml", None, {}, None),
        ("network.yaml", "model_rows.py", NETWORK, "Rows"),
        ("network.yaml", "model_windows.py", NETWORK | WINDOWS, "Windows"),
    ],
)
def test_a_template_runs_and_its_newest_run_is_read(folder, workflow, module, variables, network):
    if module:
        (folder / module).rename(folder / "model.py")
    launch = fork_python if module else run  # one template runs as a user runs it
    text = launch(folder, "-m", "qtorch", "run", workflow, **variables)
    assert "are not in the environment" not in text  # the template has defaults for the others
    if network:
        assert network in text
    script = folder / "read_exp_res.py"
    script.write_text(COMPAT + script.read_text())
    assert "Output has been saved" in launch(folder, script.name)

    metrics = pd.read_csv(folder / "qlib_res.csv", index_col=0).iloc[:, 0]
    assert set(METRICS) <= set(metrics.index)
    report = pd.read_pickle(folder / "ret.pkl")
    assert {"account", "return", "turnover", "cost", "value", "cash", "bench"} <= set(report)
    assert len(report) == 132
    excess_return = (report["return"] - report["bench"]).mean() * 238
    assert metrics["1day.excess_return_without_cost.annualized_return"] == pytest.approx(
        excess_return
    )
