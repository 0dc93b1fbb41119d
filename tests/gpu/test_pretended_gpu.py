"""Every network trains and scores on a pretended GPU, and no step waits for the device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

Program = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"

STEPS = ("train", "valid", "predict")  # stages of single batches

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pretended_gpu")]


@pytest.fixture(scope="module")
def run_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Return `run_program(file, ...)`: run a Python program with a pretended device to its end.

    It is forked from a process in which the device was pretended before torch was imported.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the library of the pretended GPU")
    if torch.version.cuda is not None:
        pytest.skip("this build of torch has CUDA: run the tests marked gpu on a real one")
    folders = [str(ROOT), str(ROOT / "tests" / "gpu"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, folders))
    server = subprocess.Popen(
        [sys.executable, "tests/gpu/program_server.py"], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        assert server.stdin is not None
        assert server.stdout is not None
        folder = tmp_path_factory.mktemp("program")
        output, errors = folder / "output", folder / "errors"
        request = {"arguments": arguments, "output": str(output), "errors": str(errors)}
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())

    yield run
    server.communicate(timeout=60)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, run_program: Program) -> dict[str, Any]:
    """The stages of every network's training and prediction, by one process."""
    path = tmp_path_factory.mktemp("gpu") / "report.json"
    process = run_program("tests/gpu/network_stages.py", str(path))
    assert process.returncode == 0, process.stderr[-3000:]
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def table_rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading of docs/gpu.md, without its head."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


LAUNCHES = {
    name: [int(number) for number in numbers] for name, *numbers in table_rows("Launches of a step")
}
NETWORKS = sorted(
    {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    - {"lightning", "lightgbm", "linear", "xgboost", "catboost", "double_ensemble"}
)


def is_step(stage: str) -> bool:
    return stage.removesuffix(" in the first epoch") in STEPS


@pytest.mark.parametrize("name", NETWORKS)
def test_network_neither_waits_for_the_device_nor_keeps_its_memory(
    name: str, report: dict[str, Any]
) -> None:
    assert "error" not in report[name], report[name]["error"]
    assert report[name]["tensors"] == 0, "a fit or a prediction leaves tensors on the device"
    stages = report[name]["stages"]
    waits = {stage: c["waits"] for stage, c in stages.items() if is_step(stage)}
    assert not any(waits.values()), waits
    assert {"train", "train in the first epoch", "valid", "predict"} <= set(waits)
    launches = [-(-stages[s]["kernels"] // stages[s]["calls"]) for s in STEPS]
    recorded = LAUNCHES[name]
    assert recorded[0] == 0
    for stage, number, limit in zip(STEPS, launches, recorded[1:], strict=True):
        # A little room, because torch's versions divide some operations differently.
        assert 0.8 * limit - 5 <= number <= 1.05 * limit + 3, (
            f"a {stage} step starts {number} kernels, docs/gpu.md has {limit}"
        )


def test_every_wait_outside_of_the_steps_is_listed_with_its_reason(report: dict[str, Any]) -> None:
    rows = table_rows("Waits outside of the steps")
    assert all(len(row) == 4 and all(row) for row in rows)
    listed = {(occasion, function.strip("`")) for occasion, _, function, _ in rows}
    occasions = {"around the epochs": "each fit", "around predict": "each prediction"}
    waits = {
        (occasions.get(stage, "each epoch"), wait.partition(" @ ")[2])
        for result in report.values()
        for stage, counts in result["stages"].items()
        if not is_step(stage)
        for wait in counts["waits"]
    }
    assert waits == listed


def test_no_network_adds_in_an_order_that_the_device_chooses(report: dict[str, Any]) -> None:
    atomic = {"index_add", "index_add_", "scatter_add", "scatter_add_"}
    sums = {
        name: sorted(atomic & operations)
        for name, result in report.items()
        for operations in [{o for c in result["stages"].values() for o in c["operations"]}]
    }
    assert not any(sums.values()), sums


def test_recurrent_networks_train_in_mixed_precision(tmp_path: Path, run_program: Program) -> None:
    """Their layers get inputs, states and weights of one dtype."""
    path, names = tmp_path / "errors.json", ["add", "adarnn", "gru", "lstm", "tcts"]
    process = run_program("tests/gpu/mixed_precision.py", str(path), *names)
    assert process.returncode == 0, process.stderr[-3000:]
    errors = json.loads(path.read_text())
    assert errors == dict.fromkeys(names), "\n".join(filter(None, errors.values()))


def test_the_same_fit_twice_is_bit_identical(tmp_path: Path, run_program: Program) -> None:
    """Also without trainer.deterministic; and a network that adds atomically is found."""
    path = tmp_path / "differences.json"
    process = run_program("tests/gpu/same_fit_twice.py", str(path), "sums", "igmtf", "gru")
    assert process.returncode == 0, process.stderr[-3000:]
    differences = json.loads(path.read_text())
    assert all(differences.pop("sums").values())
    assert not any(d for parts in differences.values() for d in parts.values()), differences


def test_features_start_few_kernels_and_wait_only_for_their_copy(run_program: Program) -> None:
    """However many instruments a block has."""
    process = run_program("tests/gpu/feature_launches.py")
    assert process.returncode == 0, process.stderr[-3000:]
    counts = json.loads(process.stdout)
    assert counts["waits"] == {}
    fetch = "copied to the host @ qtorch/data/transfer.py BlockFetcher.finish"
    assert counts["waits in host memory"] == {fetch: 1}
    rows = {name: int(number) for name, number in table_rows("Features")}
    limit = rows["launches of a block of Alpha158"]
    assert limit < 500
    assert 0.9 * limit <= counts["kernels"] <= 1.02 * limit + 3


def test_a_fleet_waits_for_nothing_and_its_launches_do_not_grow_with_members(
    run_program: Program,
) -> None:
    process = run_program("tests/gpu/fleet_launches.py")
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout)
    assert set(report["steps"]) == {"MLP", "GRU", "Transformer"}
    for name, counts in report["steps"].items():
        assert not any(c["waits"] for c in counts.values()), (name, counts)
        assert counts["2"]["kernels"] == counts["4"]["kernels"] > 0, (name, counts)
    assert all(0 <= d < 1e-5 for d in report["differences"].values()), report["differences"]


def test_a_graph_of_the_step_starts_as_many_kernels_as_recorded(run_program: Program) -> None:
    rows = table_rows("A CUDA graph of the training step")
    process = run_program("tests/gpu/graph_launches.py", *(name for name, *_ in rows))
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout)
    assert not any(result["waits"] for result in report.values()), report
    for name, *recorded in rows:
        launches = report[name]["launches"]
        assert all(
            0.8 * int(limit) - 2 <= number <= 1.05 * int(limit) + 2
            for number, limit in zip(launches, recorded, strict=True)
        ), (name, launches)


def test_a_stream_that_does_not_wait_for_another_is_noticed(run_program: Program) -> None:
    process = run_program("tests/gpu/stream_order.py")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "another one may not have written" in process.stdout


GPU_TESTS = [
    "tests/data/dataset/test_batches.py",
    "tests/data/dataset/test_samples.py",
    "tests/data/expression/test_evaluation.py",
    "tests/data/handler/test_feature_device.py",
    "tests/metrics/test_ic.py",
    "tests/model/test_cuda.py",
    "tests/model/test_cuda_graph.py",
]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, run_program: Program
) -> dict[str, list[ElementTree.Element]]:
    """The results of the tests marked gpu on the pretended device, by file."""
    path = tmp_path_factory.mktemp("gpu") / "results.xml"
    process = run_program(
        *["-m", "pytest", "-p", "pretended_plugin", "-p", "no:cacheprovider", "-m", "gpu", "-q"],
        *[f"--junit-xml={path}", "-o", "junit_family=xunit1", *GPU_TESTS],
    )
    assert process.returncode in (0, 1), process.stdout[-3000:] + process.stderr[-3000:]
    by_file: dict[str, list[ElementTree.Element]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        by_file.setdefault(case.get("file", ""), []).append(case)
    return by_file


@pytest.mark.parametrize("path", GPU_TESTS)
def test_gpu_tests_pass_on_the_pretended_device(path: str, results: Any) -> None:
    assert results[path]
    problems = {
        case.get("name"): "".join(child.text or "" for child in case if child.tag != "system-out")
        for case in results[path]
        if any(child.tag in ("failure", "error", "skipped") for child in case)
    }
    assert not problems, "\n".join(f"{name}:\n{text[-2000:]}" for name, text in problems.items())


def test_every_file_with_gpu_tests_runs_on_the_pretended_device() -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text() and path.name != Path(__file__).name
    }
    assert files == set(GPU_TESTS)
