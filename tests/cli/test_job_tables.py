"""Tests of the table of a sweep's jobs on terminals of different widths."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import qtorch
from qtorch.cli.tables import jobs as job_tables
from qtorch.cli.tables.console import OverridesCell, print_table
from qtorch.core.terminal import Terminal
from qtorch.study.sweep import JobResult, SeedGroup
from qtorch.study.sweep_job import FIT_FROM_TAG

RUN = "0123456789abcdef0123456789abcdef"
OVERRIDES = [
    "handler.instruments=[AAPL,MSFT,GOOG,AMZN,META]",
    "model.optimizer.lr=0.0001",
    "seed=0",
]


@pytest.fixture
def render_jobs(monkeypatch):
    """Return `render_jobs(width)`: the lines of a table of one job on a terminal of that width."""

    def render(width: int) -> list[str]:
        console = Terminal(width=width)
        monkeypatch.setattr(job_tables, "terminal", lambda: console)
        metrics = {"test.IC": 0.0123, "test.Rank ICIR": 0.4567}
        job = JobResult(0, OVERRIDES, "FINISHED", 1.5, RUN, metrics=metrics, note="records only")
        with console.capture() as capture:
            console.print(job_tables.jobs_table("sweep a", [job]))
        return [line.strip() for line in capture.get().splitlines() if line.strip()]

    return render


@pytest.mark.parametrize("width", [80, 100, 120, 150, 200])
def test_overrides_end_at_separators_and_runs_are_not_cut(render_jobs, width):
    text = "\n".join(render_jobs(width))
    for part in ("handler.instruments=", "[AAPL,", "META]", "model.optimizer.lr=0.0001", RUN):
        assert part in text
    assert "FINISHED" in text
    assert "records only" in text
    assert ("0.4567" in text) == (width >= 110)


def test_narrow_table_has_one_line_per_part(render_jobs):
    lines = render_jobs(80)
    assert lines[-5:] == [
        "0   handler.instruments=[AAPL,MSFT,    FINISHED   0.0123         -       1.5",
        "GOOG,AMZN,META]",
        "model.optimizer.lr=0.0001 seed=0",
        RUN,
        "records only",
    ]


def test_table_over_seeds_fits_a_narrow_terminal(monkeypatch):
    console = Terminal(width=80)
    monkeypatch.setattr(job_tables, "terminal", lambda: console)
    metrics = {f"test.{figure}": 0.0123 for figure in job_tables.FIGURES}
    jobs = [
        JobResult(k, [*OVERRIDES[:-1], f"seed={k}"], "FINISHED", metrics=metrics) for k in (0, 1)
    ]
    with console.capture() as capture:
        console.print(job_tables._groups_table([SeedGroup(" ".join(OVERRIDES), tuple(jobs))]))
    output = capture.get()
    assert "0.0123 ± 0.0000   0.0123 ± 0.0000" in output
    assert " model.optimizer.lr=0.0001 seed=0 " in output


def test_long_word_is_broken_at_commas_then_at_dots_then_anywhere():
    console = Terminal(width=10)
    with console.capture() as capture:
        console.print(OverridesCell("model.lstm.size=8,16 a=bbbbbbbbbbbbb,c lr=0.001"))
    assert capture.get().split("\n") == [
        "model.", "lstm.size=", "8,16 a=", "bbbbbbbbbb", "bbb,", "c lr=0.001", ""
    ]  # fmt: skip


def test_overrides_are_not_cut_in_a_pipe(capsys):
    override = "model.network._target_=a_package_with_a_long_name.networks.recurrent.ALongNetwork"
    rows = [JobResult(k, [override, f"seed={k}"], "FINISHED", 2.0, RUN) for k in (0, 1)]
    print_table(job_tables.jobs_table("2 jobs", rows))
    lines = capsys.readouterr().out.splitlines()
    assert sum(override in line and RUN in line for line in lines) == 2


def test_memory_of_a_training_on_a_gpu():
    memory = {"features": 812_300_000, "weights": 40_000, "peak": 1_234_567_890}
    fit = {"memory": memory, "store": "device", "feature_dtype": "bfloat16"}
    features = "812.3 MB features (bfloat16, on the device), 0.0 MB weights"
    peak = "1,234.6 MB of the device at most"
    assert job_tables._memory_facts(fit) == {"memory": f"{features}, {peak}"}
    del memory["peak"]
    assert job_tables._memory_facts({**fit, "store": "host"}) == {
        "memory": features.replace("on the device", "in host memory")
    }
    assert job_tables._memory_facts({**fit, "feature_dtype": "float32"}) == {}
    assert job_tables._memory_facts({}) == {}


def test_the_summary_has_the_path_of_the_data():
    source = {"_target_": "qtorch.data.TableSource", "path": "bars/csv"}
    task = {"dataset": {"handler": {"source": source, "instruments": "all"}}}
    assert job_tables._data_facts(task)["data"] == "TableSource bars/csv, all"
    source = {"_target_": "qtorch.data.QlibSource", "provider_uri": {"day": "a", "1min": "b"}}
    task = {"dataset": {"handler": {"source": source, "instruments": "all"}}}
    assert job_tables._data_facts(task)["data"] == "QlibSource, all"


@pytest.mark.parametrize(
    ("record", "benchmark"),
    [
        ({"_target_": "qtorch.record.PortAnaRecord"}, "the mean of the scored instruments"),
        ({"class": "PortAnaRecord", "kwargs": {"config": {"backtest": {"benchmark": "scored"}}}},
         "the mean of the scored instruments"),
        ({"_target_": "PortAnaRecord", "config": {"backtest": {"benchmark": "SPY"}}}, "SPY"),
        ({"_target_": "PortAnaRecord", "config": {"backtest": {"benchmark": ["A", "B"]}}},
         "the mean of 2 instruments"),
    ],
)  # fmt: skip
def test_summary_shows_own_return_and_names_the_benchmark(account_walk, record, benchmark):
    report, _ = account_walk(num_days=40)
    own_return = 240 * (report["return"] - report["cost"]).mean()
    metrics = {
        "1day.excess_return_with_cost.annualized_return": 0.18,
        "1day.excess_return_with_cost.information_ratio": 3.72,
        "1day.periods_per_year": 240.0,
    }
    task = {"record": ["SigAnaRecord", record]}
    assert job_tables._portfolio_text(metrics, report, task) == (
        f"{own_return:.1%} per year after costs; 18.0% over the benchmark ({benchmark}), "
        "information ratio 3.72"
    )


def test_summary_of_a_portfolio_without_benchmark(account_walk):
    report, _ = account_walk(num_days=40, bench=False)
    metrics = {
        "1day.return_with_cost.annualized_return": -0.05,
        "1day.return_with_cost.information_ratio": -0.4,
        "1day.periods_per_year": 240.0,
    }
    text = job_tables._portfolio_text(metrics, report, {"record": []})
    own_return = 240 * (report["return"] - report["cost"]).mean()
    assert text == f"{own_return:.1%} per year after costs (no benchmark), information ratio -0.40"
    assert job_tables._portfolio_text({}, None, {}) is None


def test_speed_of_a_reused_training_is_that_of_its_run():
    fit = {"samples_per_second": 41_705.3, "device": "cpu"}
    tags = {}
    recorder = SimpleNamespace(list_tags=lambda: tags)
    text = "41,705 samples/s during training on cpu"
    assert job_tables._speed_text(fit, recorder) == text
    tags[FIT_FROM_TAG] = RUN
    assert (
        job_tables._speed_text(fit, recorder) == f"{text}, in run {RUN}: this one trained nothing"
    )


def test_table_shows_the_metric_by_which_the_best_job_is_chosen(capsys):
    metrics = {"valid.Rank IC": 0.0231, "test.IC": 0.0123, "test.Rank IC": 0.0456}
    rows = [JobResult(k, [f"seed={k}"], "FINISHED", 2.0, RUN, metrics=metrics) for k in (0, 1)]
    print_table(job_tables.jobs_table("2 jobs", rows, choice_metric="valid.Rank IC"))
    _, _, segments, names, _, row, *_ = capsys.readouterr().out.splitlines()
    assert segments.split() == ["valid", "test", "test", "test", "test"]
    columns = "job overrides status run Rank IC IC ICIR Rank IC Rank ICIR seconds"
    assert " ".join(names.split()) == columns
    assert row.split()[-6:] == ["0.0231", "0.0123", "-", "0.0456", "-", "2.0"]


def test_printed_server_command_is_that_of_the_tracking_page():
    qtorch.init(tracking_uri="sqlite:///mlruns/mlflow.db")
    command = re.sub(r"sqlite:/+\S*?mlruns/", "sqlite:///mlruns/", job_tables.mlflow_command())
    page = Path(__file__).resolve().parents[2] / "docs" / "tracking.md"
    assert f"\n{command} &\n" in page.read_text()
