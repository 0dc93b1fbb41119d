"""Check correctness and speed of qtorch on a real GPU, in one command of under eight minutes.

The sections run in the order of their worth, each within its own share of the time: none starts
that does not fit into what is left, and an error ends only its own section. All numbers are in
gpu_check.json, which is written after every section, the tables in gpu_check.md.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu"), str(ROOT / "tests" / "model")]
os.environ.setdefault("QTORCH_CACHE", tempfile.mkdtemp())

import torch
from small_networks import network_config, network_dataset, network_names

from qtorch.core.instantiate import init_instance_by_config
from qtorch.data.dataset.batches import BatchLoader
from qtorch.model.fleet.fleet import Fleet
from qtorch.model.fleet.training import FleetTraining
from qtorch.model.loop.module import ScoreModule
from qtorch.model.loop.scoring import ForwardAdapter

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if HAS_GPU else "cpu")
SPEED_NETWORKS = ("lstm", "gru", "mlp", "transformer", "gats")
GRAPH_NETWORKS = ("lstm", "mlp", "transformer", "tcn", "tsmixer", "sfm", "mamba")
FLEET_NETWORKS = ("lstm", "gru", "mlp")
FLEET_SIZES = {"num_days": 600, "num_instruments": 800}
SMALL_SIZES = {"num_days": 60, "num_instruments": 50}
TWICE_NETWORKS = ("lstm", "mlp", "gats", "igmtf", "tabnet", "transformer", "tcn")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
SYNC_MESSAGE = "synchroniz"  # part of CUDA's warning


class Report:
    """Numbers by section, and a table of lines for each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sections: dict[str, list[dict[str, Any]]] = {}

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Add a row of a section's table and print it."""
        self.sections.setdefault(section, []).append(row)
        print(section, *(f"{k}: {format_value(v)}" for k, v in row.items()), sep="  ", flush=True)

    def write(self) -> None:
        """Write both files."""
        text = json.dumps(self.sections, indent=1, default=str)
        (self.folder / "gpu_check.json").write_text(text)
        parts = []
        for section, rows in self.sections.items():
            head = list(dict.fromkeys(name for row in rows for name in row))
            lines = [head, ["---"] * len(head)]
            lines += [[format_value(row.get(name, "")) for name in head] for row in rows]
            parts.append(f"## {section}\n\n" + "\n".join(f"| {' | '.join(r)} |" for r in lines))
        (self.folder / "gpu_check.md").write_text("\n\n".join(parts) + "\n")


def format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")[:200]


@contextmanager
def clean_memory() -> Iterator[None]:
    """Free the device's memory before and after the block."""
    for is_before in (True, False):
        gc.collect()
        if HAS_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if is_before:
            yield


def synchronize() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


def measure_seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median time of a call, with the time that the device needs for it."""
    times = []
    for number in range(repeats + 1):
        synchronize()
        begin = time.perf_counter()
        call()
        synchronize()
        if number:  # the first call allocates memory
            times.append(time.perf_counter() - begin)
    return median(times)


def build_model(name: str, **trainer: Any) -> Any:
    config = network_config(name, **{"deterministic": False, **trainer})
    config["checkpoint"] = {"enabled": False}
    return init_instance_by_config(config)


# -- correctness -----------------------------------------------------------------------------------


def describe_machine(report: Report, is_small: bool) -> None:
    row = {"torch": torch.__version__, "python": sys.version.split()[0], "device": "CPU"}
    if HAS_GPU:
        row["device"] = torch.cuda.get_device_name(0)
        row["memory GiB"] = str(torch.cuda.mem_get_info()[1] >> 30)
        row["CUDA"] = str(torch.version.cuda)
        row["cuDNN"] = str(torch.backends.cudnn.version())
    report.add("machine", row)


class WaitCounter:
    """Count, by CUDA's own warnings, how often training and validation steps wait."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.is_first_epoch = True

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Context manager: count the waits of all fits inside the block."""
        hooks = {name: getattr(ScoreModule, name) for name in ("training_step", "validation_step")}
        show_warning = warnings.showwarning
        try:
            for name, hook in hooks.items():
                setattr(ScoreModule, name, self._watch(hook))
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = self._count
                yield
        finally:
            warnings.showwarning = show_warning
            for name, hook in hooks.items():
                setattr(ScoreModule, name, hook)

    def _watch(self, hook: Any) -> Any:
        @functools.wraps(hook)
        def counting_hook(module: Any, batches: Any) -> Any:
            if HAS_GPU:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                return hook(module, batches)
            finally:
                if HAS_GPU:
                    torch.cuda.set_sync_debug_mode("default")

        return counting_hook

    def _count(self, message: Any, category: Any, path: str, line: int, *_: Any) -> None:
        if SYNC_MESSAGE in str(message):
            self.waits[f"{Path(path).name}:{line}"] += 1


def check_networks(report: Report, is_small: bool) -> None:
    """Train every network; compare its scores with those of the CPU, and count its waits."""
    names = ["lstm", "gats"] if is_small else network_names()
    for name in names:
        row: dict[str, Any] = {"network": name}
        counter = WaitCounter()
        try:
            with clean_memory():
                dataset, model = network_dataset(name, num_days=60), build_model(name)
                with counter.counting():
                    model.fit(dataset)
                scores = model.predict(dataset)
                model.trainer["accelerator"] = "cpu"
                expected = model.predict(dataset)
                difference = float((scores - expected).abs().max() / expected.std())
            row |= {
                "device": model.fit_report_["device"],
                "difference from the CPU (standard deviations)": difference,
                "waits in steps": counter.waits.total(),
                "where": ", ".join(counter.waits),
            }
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
        report.add("networks", row)


def check_twice(report: Report, is_small: bool) -> None:
    """Fit twice with the same seed, plain and deterministic; compare weights and metrics."""
    for name in TWICE_NETWORKS[: 2 if is_small else None]:
        for deterministic in (False, True):
            with clean_memory():
                models = []
                for _ in range(2):
                    models.append(build_model(name, max_epochs=1, deterministic=deterministic))
                    models[-1].fit(network_dataset(name, num_days=60))
                weights = [list(m.network_.state_dict().values()) for m in models]
                row = {
                    "network": name,
                    "deterministic": deterministic,
                    "equal weights": all(map(torch.equal, *weights)),
                    "equal metrics": models[0].evals_result_ == models[1].evals_result_,
                }
            report.add("the same fit twice", row)


def check_resume(report: Report, is_small: bool) -> None:
    """Kill a training with SIGKILL, resume it, and compare its weights with a whole one's."""
    program = [sys.executable, str(ROOT / "tests" / "model" / "toy_training.py")]
    accelerator = "gpu" if HAS_GPU else "cpu"
    for precision in PRECISIONS[: 1 if is_small else None]:
        trainer = {"accelerator": accelerator, "precision": precision, "deterministic": True}
        weights = []
        for steps in (["never"], ["1:5", "never"]):
            with tempfile.TemporaryDirectory() as folder:
                for step in steps:
                    subprocess.run(
                        [*program, folder, step, "SIGKILL", json.dumps(trainer)],
                        env={**os.environ, "PYTHONPATH": str(ROOT)},
                        capture_output=True, timeout=120, check=step == "never",
                    )  # fmt: skip
                weights.append(torch.load(Path(folder, "weights.pt"), map_location="cpu"))
        is_equal = all(torch.equal(value, weights[1][k]) for k, value in weights[0].items())
        report.add("resume after kill -9", {"precision": precision, "equal weights": is_equal})


def check_memory(report: Report, is_small: bool) -> None:
    """Show what fits leave on the device, and their peak beside the size of the features."""
    if not HAS_GPU:
        return
    sizes = {"num_days": 1000, "num_instruments": 1000}
    with clean_memory():
        before = torch.cuda.memory_allocated()
        for number in range(4):
            model = build_model("lstm", max_epochs=1, limit_train_batches=5, limit_val_batches=2)
            model.fit(network_dataset("lstm", **sizes))
            row = {
                "fit": number + 1,
                "left MiB": (torch.cuda.memory_allocated() - before) >> 20,
                "peak MiB": (torch.cuda.max_memory_allocated() - before) >> 20,
                "features MiB": (20 * 4 * 1000 * 1000) >> 20,
            }
            report.add("memory", row)


def run_gpu_tests(report: Report, is_small: bool) -> None:
    """Run the tests marked gpu."""
    if not HAS_GPU:
        return
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=line", "tests/model/test_cuda.py",
         "tests/model/test_cuda_graph.py", "tests/data", "tests/metrics"],
        cwd=ROOT, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    lines = [line for line in process.stdout.splitlines() if line.strip()]
    for line in lines[-20:]:
        if line.startswith(("FAILED", "ERROR")) or " passed" in line or " failed" in line:
            report.add("tests", {"result": line})


# -- speed -----------------------------------------------------------------------------------------


def run_steps(network: Any, batches: list[tuple[Any, Any]], optimizer: Any) -> None:
    """Train by a hand-written loop on tensors that are ready."""
    for x, y in batches:
        torch.nn.functional.mse_loss(network(x), y).backward()
        torch.nn.utils.clip_grad_value_(network.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def capture_step(network: Any, optimizer: Any, x: Any, y: Any) -> Callable[[], None]:
    """Return a function that repeats one step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_steps(network, [(x, y)] * 3, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_steps(network, [(x, y)], optimizer)
    return graph.replay


def profile_steps(call: Callable[[], Any], num_steps: int) -> dict[str, float]:
    """Return kernels per step, and the share of the time in which the device works."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        call()
        synchronize()
        seconds = time.perf_counter() - begin
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy_seconds = sum(e.self_device_time_total for e in kernels) / 1e6
    return {"launches a step": len(kernels) / num_steps, "busy": busy_seconds / seconds}


def check_speed(report: Report, is_small: bool) -> None:
    """Compare fits with hand-written loops on ready tensors, in samples per second."""
    sizes = {"num_days": 60, "num_instruments": 50} if is_small else {}
    sizes = sizes or {"num_days": 1500, "num_instruments": 800}
    num_steps = 5 if is_small else 50
    for name in SPEED_NETWORKS[: 1 if is_small else None]:
        dataset = network_dataset(name, **sizes)
        for batch_size in (800,) if is_small or name == "gats" else (800, 8000):
            with clean_memory():
                model = build_model(
                    name, max_epochs=3, limit_train_batches=8 * num_steps, limit_val_batches=1
                )
                model.batch["size"] = batch_size
                model.fit(dataset)
                row: dict[str, Any] = {"network": name, "batch": batch_size}
                row["fit"] = model.fit_report_["samples_per_second"]
                if name != "gats":
                    row |= hand_written_speeds(model, dataset, batch_size, num_steps)
            report.add("samples per second", row)


def hand_written_speeds(
    model: Any, dataset: Any, batch_size: int, num_steps: int
) -> dict[str, float]:
    """Return the speeds of loops by hand: plain, and as a CUDA graph."""
    samples = dataset.samples("train", data_key="learn").to(DEVICE)
    size = min(batch_size, len(samples))
    batch = samples.batch(torch.arange(size, device=samples.index_device))
    network = model.network_.to(DEVICE).train()
    (x,), _ = ForwardAdapter(network).arguments(batch)
    y = batch.y[:, 0].nan_to_num()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    batches = [(x, y)] * num_steps
    seconds = measure_seconds(lambda: run_steps(network, batches, optimizer), 3)
    row = {"by hand": num_steps * size / seconds}
    if HAS_GPU:
        row |= profile_steps(lambda: run_steps(network, batches[:10], optimizer), 10)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True, capturable=True)
        replay = capture_step(network, optimizer, x, y)
        seconds = measure_seconds(lambda: [replay() for _ in range(num_steps)], 3)
        row["by hand, as a CUDA graph"] = num_steps * size / seconds
    return row


def check_graph(report: Report, is_small: bool) -> None:
    """Compare fits whose steps are a CUDA graph with ordinary ones: weights, samples per second."""
    sizes = SMALL_SIZES if is_small else FLEET_SIZES
    for name in GRAPH_NETWORKS[: 1 if is_small else None]:
        dataset, models = network_dataset(name, **sizes), []
        for cuda_graph in ("auto", False):
            with clean_memory():
                model = build_model(name, max_epochs=2, limit_train_batches=200)
                model.batch["size"], model.cuda_graph = 800, cuda_graph
                model.fit(dataset)
            models.append(model)
        graphed, ordinary = models
        weights = (m.network_.state_dict().values() for m in models)
        row = {
            "network": name,
            "graph": graphed.fit_report_["cuda_graph"],
            "difference of weights": max(
                float((a.double() - b.double()).abs().max()) for a, b in zip(*weights, strict=True)
            ),
            "with graph": graphed.fit_report_["samples_per_second"],
            "without": ordinary.fit_report_["samples_per_second"],
        }
        report.add("CUDA graph of the step", row)


def check_fleet(report: Report, is_small: bool) -> None:
    """Compare fleets with single fits of the same samples, in samples per second of all members."""
    sizes = SMALL_SIZES if is_small else FLEET_SIZES
    for name in FLEET_NETWORKS[: 1 if is_small else None]:
        dataset = network_dataset(name, **sizes)
        for batch_size in (800,) if is_small else (800, 8000):
            single = fleet_speed(name, dataset, batch_size, 1)
            for num_members in (2,) if is_small else (1, 8, 20, 64):
                with clean_memory():
                    speed = fleet_speed(name, dataset, batch_size, num_members, is_fleet=True)
                row = {"network": name, "batch": batch_size, "members": num_members}
                report.add("fleet", {**row, "fleet": speed, "one": single, "ratio": speed / single})


def fleet_speed(
    name: str, dataset: Any, batch_size: int, num_members: int, *, is_fleet: bool = False
) -> float:
    """Return the samples per second of two epochs, the second of which is counted."""
    models = [build_model(name, max_epochs=2) for _ in range(num_members)]
    for seed, model in enumerate(models):
        model.batch["size"], model.seed = batch_size, seed
    rounds = []
    run_round = FleetTraining.run_round

    def measure_round(self: FleetTraining, is_stop_requested: Callable[[], bool]) -> bool:
        synchronize()
        begin = time.perf_counter()
        is_complete = run_round(self, is_stop_requested)
        synchronize()
        rounds.append(time.perf_counter() - begin)
        return is_complete

    if not is_fleet:
        models[0].fit(dataset)
        return float(models[0].fit_report_["samples_per_second"])
    FleetTraining.run_round = measure_round
    try:
        jobs = Fleet(num_members).run([functools.partial(m.fit, dataset) for m in models])
    finally:
        FleetTraining.run_round = run_round  # type: ignore[method-assign]
    for error in (job.error for job in jobs if job.error is not None):
        raise error
    return num_members * float(models[0].fit_report_["samples"]) / rounds[-1]


def check_processes(report: Report, is_small: bool) -> None:
    """Measure separate processes that train one model each at once, as without a fleet.

    The samples per second are the sum of all processes, to compare with those of a fleet.
    """
    for name in FLEET_NETWORKS[: 1 if is_small else None]:
        for num_processes in (2,) if is_small else (8,):
            speeds = process_speeds(name, 800, num_processes, is_small=is_small)
            row = {"network": name, "batch": 800, "processes": num_processes}
            report.add("processes", {**row, "all": sum(speeds), "slowest": min(speeds)})


def process_speeds(
    name: str, batch_size: int, num_processes: int, *, is_small: bool
) -> list[float]:
    """Return the samples per second of each of several processes that train at the same time."""
    program = [sys.executable, str(Path(__file__).with_name("one_of_many.py")), name]
    with tempfile.TemporaryDirectory() as folder:
        options = [folder, *(["--small"] if is_small else [])]
        processes = [
            subprocess.Popen(
                [*program, str(batch_size), str(seed), *options], stdout=subprocess.PIPE, text=True
            )
            for seed in range(num_processes)
        ]
        try:
            while len(list(Path(folder).glob("ready-*"))) < num_processes:
                _raise_failure(processes)
                time.sleep(0.05)
            Path(folder, "go").touch()
            outputs = [process.communicate(timeout=120)[0] for process in processes]
            _raise_failure(processes)
        finally:
            for process in processes:
                process.kill()
    return [float(output.split()[-1]) for output in outputs]


def _raise_failure(processes: list[subprocess.Popen[str]]) -> None:
    if any(process.poll() for process in processes):
        raise RuntimeError("a process failed; its message is above.")


def check_gather(report: Report, is_small: bool) -> None:
    """Measure how fast the loader gathers batches of windows, beside a copy on the device."""
    values = torch.empty(1 << (22 if is_small else 30), device=DEVICE)
    target = torch.empty_like(values)
    seconds = measure_seconds(functools.partial(target.copy_, values), 3)
    report.add("gather", {"what": "copy on the device", "GB/s": 8 * len(values) / seconds / 1e9})
    del values, target  # memory for the loader
    sizes = {"num_days": 60, "num_instruments": 50} if is_small else {}
    sizes = sizes or {"num_days": 2500, "num_instruments": 1000}
    for order in ("random", "day"):
        samples = network_dataset("lstm", **sizes).samples("train").to(DEVICE)
        loader = BatchLoader(samples, batch_size=800, order=order)
        seconds = measure_seconds(lambda loader=loader: [None for _ in loader], 2)
        num_bytes = 2 * len(samples) * samples.num_steps * samples.num_features * 4
        row = {"what": f"windows, order={order}", "GB/s": num_bytes / seconds / 1e9}
        report.add("gather", {**row, "windows/s": len(samples) / seconds})


def check_features(report: Report, is_small: bool) -> None:
    """Compute Alpha158 on the device; compare it with the CPU and measure the time."""
    import pandas as pd

    from qtorch.data.expression.evaluation import evaluate
    from qtorch.data.handler.alpha import alpha158
    from qtorch.data.panel.columns import instrument_major
    from qtorch.data.panel.panel import Panel

    expressions, names = alpha158()
    features = dict(zip(names, expressions, strict=True))

    def make_bars(num_days: int, num_instruments: int) -> Panel:
        generator = torch.Generator().manual_seed(0)
        steps = 0.02 * torch.randn(num_days, num_instruments, generator=generator)
        noise = 1 + 0.01 * torch.rand(6, num_days, num_instruments, generator=generator)
        values = noise * steps.cumsum(0).exp() * 20
        days = pd.bdate_range("2000-01-03", periods=num_days)
        instruments = [f"S{k}" for k in range(num_instruments)]
        fields = ["open", "high", "low", "close", "vwap", "volume"]
        return Panel(values.permute(1, 2, 0), days, instruments, fields)

    bars = make_bars(200, 20)
    on_cpu, on_device = evaluate(features, bars), evaluate(features, bars.to(DEVICE))
    is_close = torch.isclose(
        on_device.values.cpu(), on_cpu.values, rtol=1e-4, atol=1e-5, equal_nan=True
    )
    share = float((~is_close).float().mean())
    report.add("Alpha158", {"what": "cells that differ from the CPU", "value": share})
    for num_instruments, num_days in ((50, 300),) if is_small else ((500, 2500), (5000, 5000)):
        with clean_memory():
            device_bars = make_bars(num_days, num_instruments).to(DEVICE)
            seconds = measure_seconds(functools.partial(evaluate, features, device_bars), 1)
        row = {"what": f"{num_instruments} instruments x {num_days} days, seconds"}
        report.add("Alpha158", {**row, "value": seconds})
        del device_bars
        with clean_memory():
            bars = make_bars(num_days, num_instruments)
            out = instrument_major(num_days, num_instruments, len(names))
            compute = functools.partial(evaluate, features, bars, out=out, device=DEVICE)
            seconds = measure_seconds(compute, 1)
        row = {"what": f"{num_instruments} x {num_days}, from and to host memory, seconds"}
        report.add("Alpha158", {**row, "value": seconds})
        del bars, out, compute


def check_shared_gpu(report: Report, is_small: bool) -> None:
    """Train in two processes on one device at the same time."""
    program = [sys.executable, str(ROOT / "tests" / "model" / "toy_training.py")]
    trainer = json.dumps({"accelerator": "gpu" if HAS_GPU else "cpu"})
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for number in range(2):
            Path(folder, str(number)).mkdir()
            arguments = [str(Path(folder, str(number))), "never", "SIGKILL", trainer]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            processes.append(subprocess.Popen([*program, *arguments], env=environment))
        codes = [process.wait(timeout=100) for process in processes]
    report.add("two processes on one device", {"exit codes": codes})


Section = Callable[[Report, bool], None]
SECTIONS: dict[str, tuple[Section, int]] = {  # with the seconds that each may take on an H200
    "machine": (describe_machine, 5),
    "networks": (check_networks, 110),
    "twice": (check_twice, 60),
    "resume": (check_resume, 60),
    "memory": (check_memory, 15),
    "speed": (check_speed, 75),
    "graph": (check_graph, 40),
    "fleet": (check_fleet, 45),
    "processes": (check_processes, 60),
    "gather": (check_gather, 15),
    "features": (check_features, 35),
    "tests": (run_gpu_tests, 70),
    "shared": (check_shared_gpu, 20),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--only", help=f"sections, from {','.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--dry-run", action="store_true", help="small, and on the CPU")
    options = parser.parse_args(arguments)
    if not HAS_GPU and not options.dry_run:
        print("torch sees no CUDA device (--dry-run runs a small check on the CPU).")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    report, begin, failed = Report(options.out), time.monotonic(), []
    warnings.simplefilter("ignore")
    if HAS_GPU:  # the CPU, beside which it is compared, has the rest of the machine to itself
        torch.set_num_threads(min(8, os.cpu_count() or 1))
    for name in options.only.split(",") if options.only else SECTIONS:
        run_section, seconds = SECTIONS[name]
        remaining = 60 * options.minutes - (time.monotonic() - begin)
        if remaining < 0.6 * seconds:
            report.add("not started", {"section": name, "seconds left": round(remaining)})
            continue
        try:
            run_section(report, options.dry_run)
        except Exception as error:
            failed.append(name)
            traceback.print_exc()
            report.add("failed", {"section": name, "error": f"{type(error).__name__}: {error}"})
        report.write()
    report.write()
    print(f"\n{(options.out / 'gpu_check.md').read_text()}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
