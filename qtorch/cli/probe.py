"""`qtorch probe`: change the data after some dates and report what leaks from the future."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtorch.cli.compose import compose_settings
from qtorch.cli.guard import configure_process, handle_stop_signals
from qtorch.cli.options import output_path
from qtorch.core.errors import ConfigError
from qtorch.trainer.segments import resolve_segments

if TYPE_CHECKING:
    from qtorch.study.leakage.report import ProbeReport

USAGE = """\
qtorch probe: look for leaks of the future in a configuration or a run

usage: qtorch probe [GROUP=OPTION ...] [KEY=VALUE ...] [run=RUN_ID] ["dates=[DATE,...]"]
                    [methods=[scale,shuffle,delete]] [accept=[NAME,...]] [json=FILE] [page=FILE]

  run      probe the dataset and the fitted model of a finished run: its ID, its first digits, its
           name, or latest
  dates    the data after each of these dates is changed; default: one in the first and one in the
           last segment after train
  methods  scale: multiply later values by random factors; shuffle: permute later days; delete: end
           half of the instruments, and remove days of the others
  fit      true: fit the configured model on one batch and compare its scores; false: no scores
  accept   lines of the report whose leak is known: they are shown as accepted
  json     write the report to a .json file, page: to an .html file

  qtorch probe data=table data.path=bars.parquet handler=alpha158 model=gru
  qtorch probe run=RUN_ID "dates=[2019-06-28]" json=probe.json

The groups (data, handler, dataset, model, ...) are those of `qtorch train`.

exit code: 0 if there is no leak, 1 if a line leaks (or the probe failed)
"""
VERDICT_STYLES = {"ok": "green", "LEAK": "bold red", "warning": "yellow", "accepted": "yellow"}
# A verdict on scores does not depend on how well the model is fitted.
SHORT_TRAINER = {
    "max_epochs": 1,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
}
SHORT_BOOSTING = {"num_boost_round": 5, "early_stopping_rounds": 5, "epochs": 5}


def main(argv: Sequence[str]) -> int:
    """Probe the configuration or the run, print the report; return 1 if there is a leak."""
    settings = compose_settings("probe", argv)
    configure_process(settings["log_level"], (settings["tracking"] or {}).get("uri"))
    paths = {key: _report_path(settings[key], f".{suffix}") for key, suffix in FILES.items()}
    with handle_stop_signals():
        report = _run_probe(settings)
    _print_report(report)
    _write_files(report, paths)
    return int(report.has_leak)


FILES = {"json": "json", "page": "html"}


def _run_probe(settings: dict[str, Any]) -> ProbeReport:
    from qtorch.study.leakage.probe import probe

    options = {name: settings[name] for name in ("dates", "methods", "accept", "seed")}
    if settings["run"] is not None:
        from qtorch.cli.runs import load_finished_run, load_model_and_dataset

        recorder = load_finished_run(settings["run"])
        model, dataset = load_model_and_dataset(recorder, None, allow_nonfinite=True)
        return probe(dataset, model, **options)
    from qtorch.core.instantiate import init_instance_by_config

    task = resolve_segments(settings["task"])
    dataset = init_instance_by_config(task["dataset"])
    model = init_instance_by_config(shorten_training(task["model"])) if settings["fit"] else None
    return probe(dataset, model, fit=settings["fit"], **options)


def shorten_training(model: dict[str, Any]) -> dict[str, Any]:
    """Return a model's configuration that is fitted in seconds: one batch, or five trees."""
    if "trainer" in model:
        trainer = {**(model["trainer"] or {}), **SHORT_TRAINER}
        trainer.pop("strategy", None)
        trainer.pop("num_nodes", None)
        module = model.get("module")
        if isinstance(module, dict) and "pretrain_epochs" in module:
            module = {**module, "pretrain_epochs": 1}
        return {**model, "trainer": trainer, "module": module, "early_stop": None}
    return {**model, **{k: v for k, v in SHORT_BOOSTING.items() if k in model}}


def _report_path(out: str | None, suffix: str) -> Path | None:
    """Check and return the path of a file to write, before any work is done."""
    if out is None:
        return None
    path = output_path(out)
    if path.suffix != suffix:
        raise ConfigError(f"{out}: expected a name that ends in {suffix}.")
    return path


def _print_report(report: ProbeReport) -> None:
    from rich.text import Text

    from qtorch.cli.tables.console import new_table, print_table, terminal, with_label

    dates = ", ".join(f"{date:%Y-%m-%d}" for date in report.dates)
    title = f"data changes after {dates} ({', '.join(report.methods)})"
    table = new_table("part", "verdict", "details", title=title, no_wrap=("part", "verdict"))
    for line in report.lines:
        verdict = Text(line.verdict, VERDICT_STYLES.get(line.verdict, "dim"))
        table.add_row(line.name, verdict, line.detail)
    print_table(table)
    for name, text in report.facts.items():
        terminal().print(with_label(f"{name}:", text), soft_wrap=True)
    terminal().print(report.summary(), soft_wrap=True)


def _write_files(report: ProbeReport, paths: dict[str, Path | None]) -> None:
    if (path := paths["json"]) is not None:
        path.write_text(report.to_json() + "\n", encoding="utf-8")
    if (path := paths["page"]) is not None:
        from qtorch.study.leakage.page import write_page

        write_page(report, path)
