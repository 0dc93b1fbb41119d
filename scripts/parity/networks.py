"""Compare qtorch's networks with Qlib's, using Qlib's weights, over a grid of sizes.

    QTORCH_QLIB_PYTHON=/path/to/python python scripts/parity/networks.py [OUT.npz]

Prints the table of the whole grid. With OUT.npz it instead writes Qlib's outputs for every 13th
grid point, which is tests/golden/qlib_networks.npz.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from network_cases import BANK_DAYS, TWINS, Case, arrange_windows, cases, inputs, weights
from network_weights import State, convert_weights
from torch import Tensor, nn

import qtorch.nn
from qtorch.nn.network import Network

TOLERANCE, EVERY = 1e-5, 13
PADDING = 2  # padded instruments in the day batches

Shapes = list[tuple[str, list[int]]]
Inputs = dict[str, Tensor]
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Answer:
    """Qlib's result for one case: the names and shapes of its parameters, its outputs by part."""

    shapes: Shapes
    parts: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One line of the table: one network over its grid."""

    file: str
    network: str
    cases: int
    outputs: int
    agree: int
    worst: float
    spread: float

    @property
    def is_available(self) -> bool:
        """Whether qtorch has the network."""
        return self.cases > 0

    @property
    def passes(self) -> bool:
        return self.agree == self.outputs

    def __str__(self) -> str:
        if not self.is_available:
            return f"{self.file:24} {self.network:12} not in qtorch.nn"
        mark = "ok" if self.passes else "FAILS"
        return (
            f"{self.file:24} {self.network:12} {self.cases:4} cases {self.outputs:6} outputs "
            f"worst {self.worst:.1e} of {self.spread:.2f} {mark}"
        )


def ask_qlib(python: str, every: int = 1, only: Iterable[str] = ()) -> dict[str, Answer]:
    """The outputs of Qlib's networks, by case."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "networks.npz"
        _run_qlib(python, target, every, only)
        return read(target)


def _run_qlib(python: str, target: Path, every: int, only: Iterable[str] = ()) -> None:
    script = Path(__file__).with_name("qlib_networks.py")
    command = [python, str(script), str(target.resolve()), str(every), *only]
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=target.resolve().parent
    )
    if process.returncode:
        raise RuntimeError(f"Qlib's side failed:\n{process.stderr[-3000:]}")


def read(source: Path) -> dict[str, Answer]:
    """Read the file written by `qlib_networks.py`."""
    with np.load(source) as arrays:
        names = arrays["names"].tobytes().decode().split("\n")
        values = np.split(arrays["values"], np.cumsum(arrays["lengths"])[:-1])
        states: dict[str, Shapes] = json.loads(arrays["states"].tobytes())
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in states}
    for name, value in zip(names, values, strict=True):
        case, part = name.split("|")
        parts[case][part] = value
    return {name: Answer(states[name], parts[name]) for name in states}


def compare(answers: Mapping[str, Answer]) -> list[Row]:
    """Compare the outputs; returns one row per file of Qlib."""
    rows = []
    stored_cases = [case for case in cases() if case.name in answers]
    if unknown_names := set(answers) - {case.name for case in stored_cases}:
        raise RuntimeError(
            f"{len(unknown_names)} cases are not in the grid, e.g. {sorted(unknown_names)[0]!r}."
        )
    for file, group in groupby(stored_cases, key=lambda case: case.name.split(":")[0]):
        twin = TWINS[file]
        if not hasattr(qtorch.nn, twin.network):
            rows.append(Row(file, twin.network, 0, 0, 0, 0.0, 0.0))
            continue
        pairs = [pair for case in group for pair in output_pairs(case, answers[case.name])]
        outputs, qlib_outputs = (np.concatenate(side) for side in zip(*pairs, strict=True))
        difference = np.abs(outputs - qlib_outputs)
        agree = int((difference <= TOLERANCE).sum())
        count = len({case.name for case in stored_cases if case.name.startswith(f"{file}:")})
        rows.append(
            Row(
                file,
                twin.network,
                count,
                len(difference),
                agree,
                float(difference.max()),
                float(qlib_outputs.std()),
            )
        )
    return rows


def output_pairs(case: Case, answer: Answer) -> list[tuple[np.ndarray, np.ndarray]]:
    """(qtorch's, Qlib's) outputs of a case: the score, and further parts that both return."""
    qlib_state = {name: torch.from_numpy(value) for name, value in weights(answer.shapes).items()}
    network = build_network(case, qlib_state)
    with torch.no_grad():
        parts = RUN.get(case.twin.network, score_only)(network, case, qlib_state)
    pairs = []
    for part, value in parts.items():
        output, qlib_output = value.numpy().reshape(-1), answer.parts[part]
        if output.shape != qlib_output.shape:
            raise RuntimeError(f"{case.name}: {part} {output.shape}, Qlib's {qlib_output.shape}.")
        pairs.append((output.astype(np.float64), qlib_output.astype(np.float64)))
    return pairs


def build_network(case: Case, qlib_state: State) -> Network:
    """Build qtorch's network with the weights of Qlib's."""
    network: Network = getattr(qtorch.nn, case.twin.network)(
        **case.twin.arguments(case.sizes)
    ).eval()
    load(network, convert_weights(case.twin.network, qlib_state, case.sizes), case.name)
    return network


def load(network: nn.Module, state: State, label: str) -> None:
    """Load weights strictly: every parameter must get a value and every value must be used."""
    parameter_names = set(network.state_dict())
    missing = {n for n in parameter_names - set(state) if not _is_not_a_weight(n)}
    if missing or set(state) - parameter_names:
        raise RuntimeError(
            f"{label}: parameters without a value {sorted(missing)}, unknown parameters "
            f"{sorted(set(state) - parameter_names)}"
        )
    network.load_state_dict(state, strict=False)


def _is_not_a_weight(name: str) -> bool:
    return name.endswith("num_batches_tracked") or name.split(".")[-1].startswith("bank")


def score_only(network: Network, case: Case, qlib_state: State) -> Parts:
    """The score of samples, or of a day batch with padded instruments."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs(case).items()}
    tensors["x"] = arrange_input(network, tensors["x"])
    if not network.cross_section:
        return {"score": network(tensors["x"], **{name: tensors[name] for name in network.extras})}
    extras = {name: build_day_batch(tensors[name])[0] for name in network.extras}
    x, mask = build_day_batch(tensors["x"])
    return {"score": network(x=x, mask=mask, **extras)[mask]}


def run_igmtf(network: Any, case: Case, qlib_state: State) -> Parts:
    """The score of IGMTF, after filling its bank with the windows of past days."""
    network.reset_bank(len(BANK_DAYS), max(BANK_DAYS) + PADDING)
    for k, window in enumerate(v for name, v in inputs(case).items() if name.startswith("bank")):
        network.write_bank(k, *build_day_batch(torch.from_numpy(window)))
    return score_only(network, case, qlib_state)


def run_add(network: Any, case: Case, qlib_state: State) -> Parts:
    """The score of ADD and the outputs of its disentangler."""
    disentangler = network.disentangler().eval()
    parameter_names = set(disentangler.state_dict())
    load(
        disentangler,
        {name: value for name, value in qlib_state.items() if name in parameter_names},
        case.name,
    )
    x, mask = build_day_batch(torch.from_numpy(inputs(case)["x"]))
    outputs = disentangler(x, mask, network.encode(x), 1.0)
    names = {"reconstruction": "reconstructed_feature"}
    parts = {names.get(name, name): value[mask] for name, value in outputs._asdict().items()}
    return score_only(network, case, qlib_state) | parts


def run_adarnn(network: Any, case: Case, qlib_state: State) -> Parts:
    """The score of ADARNN, its gates and its distance between the halves of a batch."""
    from qtorch.nn.temporal.adarnn import StepGates, step_distances

    x = torch.from_numpy(inputs(case)["x"])
    parts = score_only(network, case, qlib_state)
    if len(x) % 2 == 0:
        sizes = [case.sizes[n] for n in ("num_layers", "step_len", "hidden_size")]
        gates = StepGates(*sizes).eval()
        parameter_names = set(gates.state_dict())
        load(
            gates,
            {name: value for name, value in qlib_state.items() if name in parameter_names},
            case.name,
        )
        states = network.states(x)
        halves = [[layer.chunk(2)[k] for layer in states] for k in range(2)]
        share = gates(*halves)
        distances = torch.stack(
            [step_distances("mmd", *pair) for pair in zip(*halves, strict=True)]
        )
        parts |= {f"gate{k}": value for k, value in enumerate(share)}
        parts["distance"] = (share * distances).sum()
    return parts


def run_tra(network: Any, case: Case, qlib_state: State) -> Parts:
    """The score of TRA, the scores of all predictors, and the router's probabilities."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs(case).items()}
    predictor_scores, logits = network.predictions_and_logits(tensors["x"], tensors["errors"])
    return score_only(network, case, qlib_state) | {
        "each": predictor_scores,
        "share": logits.softmax(-1),
    }


def run_tabnet(network: Any, case: Case, qlib_state: State) -> Parts:
    """The score of TabNet, its encoder's output, and the entropy of its masks scaled as in Qlib."""
    encoder_output, entropy = network.encode(torch.from_numpy(inputs(case)["x"][:, 0]))
    scale = (case.sizes["n_steps"] - 1) / case.sizes["d_feat"]
    return score_only(network, case, qlib_state) | {
        "encoded": encoder_output,
        "sparsity": entropy.mean() * scale,
    }


def arrange_input(network: Network, x: Tensor) -> Tensor:
    """Arrange windows `[N, T, F]` in the layout that the network's `inputs` declare."""
    return (
        torch.from_numpy(arrange_windows(x.numpy(), "by feature"))
        if network.inputs == "flat"
        else x
    )


def build_day_batch(values: Tensor) -> tuple[Tensor, Tensor]:
    """Turn `[N, ...]` into a day batch `[1, N + PADDING, ...]` and its mask.

    The padded instruments are filled with sevens, so that using them would be noticed.
    """
    count = len(values)
    junk = values.new_full((PADDING, *values.shape[1:]), 7.0)
    mask = torch.arange(count + PADDING) < count
    return torch.cat((values, junk))[None], mask[None]


RUN: dict[str, Callable[[Any, Case, State], Parts]] = {
    "IGMTF": run_igmtf,
    "ADD": run_add,
    "ADARNN": run_adarnn,
    "TRA": run_tra,
    "TabNet": run_tabnet,
}


def main(python: str, every: int = 1) -> list[Row]:
    """Print the table of the whole grid, or of every `every`-th point, and return its rows."""
    rows = compare(ask_qlib(python, every))
    for row in rows:
        print(row)
    return rows


if __name__ == "__main__":
    qlib_python = os.environ["QTORCH_QLIB_PYTHON"]
    if len(sys.argv) > 1:
        _run_qlib(qlib_python, Path(sys.argv[1]), EVERY)
    else:
        sys.exit(int(any(not row.passes for row in main(qlib_python))))
