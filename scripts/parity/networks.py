"""qtorch's networks beside real Qlib's, with Qlib's weights, over a grid of sizes.

    QTORCH_QLIB_PYTHON=/path/to/python python scripts/parity/networks.py [OUT.npz]

prints the table of the whole grid; with OUT.npz it writes every 13th point of it instead, which
is tests/golden/qlib_networks.npz.
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
from network_cases import BANK_DAYS, TWINS, Case, cases, inputs, laid_out, weights
from network_weights import State, to_ours
from torch import Tensor, nn

import qtorch.nn
from qtorch.nn.network import Network

TOLERANCE, EVERY = 1e-5, 13
PADDING = 2  # instruments that are not there, in the day batches

Shapes = list[tuple[str, list[int]]]
Given = dict[str, Tensor]
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Answer:
    """What Qlib said of one case: its parameters' names and shapes, its outputs by part."""

    shapes: Shapes
    parts: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One line of the table: a network of Qlib's over its grid."""

    file: str
    ours: str
    cases: int
    outputs: int
    agree: int
    worst: float
    spread: float

    @property
    def here(self) -> bool:
        """Whether qtorch has this network."""
        return self.cases > 0

    @property
    def passes(self) -> bool:
        return self.agree == self.outputs

    def __str__(self) -> str:
        if not self.here:
            return f"{self.file:24} {self.ours:12} not in qtorch.nn"
        mark = "ok" if self.passes else "FAILS"
        return (
            f"{self.file:24} {self.ours:12} {self.cases:4} cases {self.outputs:6} outputs "
            f"worst {self.worst:.1e} of {self.spread:.2f} {mark}"
        )


def ask_qlib(python: str, every: int = 1, only: Iterable[str] = ()) -> dict[str, Answer]:
    """The outputs of real Qlib's networks, by case."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "networks.npz"
        _run_qlib(python, target, every, only)
        return read(target)


def _run_qlib(python: str, target: Path, every: int, only: Iterable[str] = ()) -> None:
    script = Path(__file__).with_name("qlib_networks.py")
    command = [python, str(script), str(target.resolve()), str(every), *only]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=target.resolve().parent
    )
    if done.returncode:
        raise RuntimeError(f"Qlib's side failed:\n{done.stderr[-3000:]}")


def read(source: Path) -> dict[str, Answer]:
    """What `qlib_networks.py` wrote."""
    with np.load(source) as kept:
        names = kept["names"].tobytes().decode().split("\n")
        values = np.split(kept["values"], np.cumsum(kept["lengths"])[:-1])
        states: dict[str, Shapes] = json.loads(kept["states"].tobytes())
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in states}
    for name, value in zip(names, values, strict=True):
        case, part = name.split("|")
        parts[case][part] = value
    return {name: Answer(states[name], parts[name]) for name in states}


def compare(answers: Mapping[str, Answer]) -> list[Row]:
    """The table: a row for each file of Qlib's."""
    rows = []
    known = [case for case in cases() if case.name in answers]
    if unknown := set(answers) - {case.name for case in known}:
        raise RuntimeError(f"{len(unknown)} cases of other grids, as {sorted(unknown)[0]!r}.")
    for file, group in groupby(known, key=lambda case: case.name.split(":")[0]):
        twin = TWINS[file]
        if not hasattr(qtorch.nn, twin.ours):
            rows.append(Row(file, twin.ours, 0, 0, 0, 0.0, 0.0))
            continue
        pairs = [pair for case in group for pair in compared(case, answers[case.name])]
        ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
        far = np.abs(ours - theirs)
        agree = int((far <= TOLERANCE).sum())
        count = len({case.name for case in known if case.name.startswith(f"{file}:")})
        rows.append(
            Row(file, twin.ours, count, len(far), agree, float(far.max()), float(theirs.std()))
        )
    return rows


def compared(case: Case, answer: Answer) -> list[tuple[np.ndarray, np.ndarray]]:
    """(qtorch's, Qlib's) outputs of a case: the score, and further parts that both give."""
    theirs = {name: torch.from_numpy(value) for name, value in weights(answer.shapes).items()}
    network = twin_network(case, theirs)
    with torch.no_grad():
        parts = RUN.get(case.twin.ours, one)(network, case, theirs)
    pairs = []
    for part, found in parts.items():
        own, qlib = found.numpy().reshape(-1), answer.parts[part]
        if own.shape != qlib.shape:
            raise RuntimeError(f"{case.name}: {part} {own.shape}, Qlib's {qlib.shape}.")
        pairs.append((own.astype(np.float64), qlib.astype(np.float64)))
    return pairs


def twin_network(case: Case, theirs: State) -> Network:
    """qtorch's network with the weights that Qlib's had."""
    network: Network = getattr(qtorch.nn, case.twin.ours)(**case.twin.own(case.sizes)).eval()
    load(network, to_ours(case.twin.ours, theirs, case.sizes), case.name)
    return network


def load(network: nn.Module, state: State, what: str) -> None:
    """Each weight gets a value, and each value has a weight."""
    held = set(network.state_dict())
    lacking = {n for n in held - set(state) if not _no_weight(n)}
    if lacking or set(state) - held:
        raise RuntimeError(
            f"{what}: without a value {sorted(lacking)}, not known {sorted(set(state) - held)}"
        )
    network.load_state_dict(state, strict=False)


def _no_weight(name: str) -> bool:
    return name.endswith("num_batches_tracked") or name.split(".")[-1].startswith("bank")


def one(network: Network, case: Case, theirs: State) -> Parts:
    """The score of samples, or of a day with padding after its instruments."""
    given = {name: torch.from_numpy(value) for name, value in inputs(case).items()}
    given["x"] = as_declared(network, given["x"])
    if not network.cross_section:
        return {"score": network(given["x"], **{name: given[name] for name in network.extras})}
    extras = {name: day(given[name])[0] for name in network.extras}
    x, mask = day(given["x"])
    return {"score": network(x=x, mask=mask, **extras)[mask]}


def with_bank(network: Any, case: Case, theirs: State) -> Parts:
    """IGMTF's, its bank written from the past days' windows."""
    network.reserve(len(BANK_DAYS), max(BANK_DAYS) + PADDING)
    for k, past in enumerate(v for name, v in inputs(case).items() if name.startswith("bank")):
        network.keep(k, *day(torch.from_numpy(past)))
    return one(network, case, theirs)


def with_lessons(network: Any, case: Case, theirs: State) -> Parts:
    """ADD's, and what its Disentangler says."""
    teacher = network.disentangler().eval()
    held = set(teacher.state_dict())
    load(teacher, {name: value for name, value in theirs.items() if name in held}, case.name)
    x, mask = day(torch.from_numpy(inputs(case)["x"]))
    said = teacher(x, mask, network.encode(x), 1.0)
    names = {"rebuilt": "reconstructed_feature"}
    parts = {names.get(name, name): value[mask] for name, value in said._asdict().items()}
    return one(network, case, theirs) | parts


def with_gates(network: Any, case: Case, theirs: State) -> Parts:
    """ADARNN's, and its distance between the halves of a batch."""
    from qtorch.nn.adarnn import StepGates, step_distances

    x = torch.from_numpy(inputs(case)["x"])
    parts = one(network, case, theirs)
    if len(x) % 2 == 0:
        sizes = [case.sizes[n] for n in ("num_layers", "step_len", "hidden_size")]
        gates = StepGates(*sizes).eval()
        held = set(gates.state_dict())
        load(gates, {name: value for name, value in theirs.items() if name in held}, case.name)
        states = network.states(x)
        halves = [[layer.chunk(2)[k] for layer in states] for k in range(2)]
        share = gates(*halves)
        far = torch.stack([step_distances("mmd", *pair) for pair in zip(*halves, strict=True)])
        parts |= {f"gate{k}": value for k, value in enumerate(share)}
        parts["distance"] = (share * far).sum()
    return parts


def with_routes(network: Any, case: Case, theirs: State) -> Parts:
    """TRA's, each predictor's, and the router's shares."""
    given = {name: torch.from_numpy(value) for name, value in inputs(case).items()}
    each, logits = network.patterns(given["x"], given["errors"])
    return one(network, case, theirs) | {"each": each, "share": logits.softmax(-1)}


def with_picks(network: Any, case: Case, theirs: State) -> Parts:
    """TabNet's, what its encoder says, and the entropy of what it picked as Qlib scales it."""
    encoded, entropy = network.encode(torch.from_numpy(inputs(case)["x"][:, 0]))
    scale = (case.sizes["n_steps"] - 1) / case.sizes["d_feat"]
    return one(network, case, theirs) | {"encoded": encoded, "sparsity": entropy.mean() * scale}


def as_declared(network: Network, x: Tensor) -> Tensor:
    """Windows `[N, T, F]` in the form that the network's `inputs` name."""
    return torch.from_numpy(laid_out(x.numpy(), "by feature")) if network.inputs == "flat" else x


def day(values: Tensor) -> tuple[Tensor, Tensor]:
    """`[N, ...]` as one day `[1, N + PADDING, ...]`, what is no instrument full of sevens; the
    mask."""
    count = len(values)
    junk = values.new_full((PADDING, *values.shape[1:]), 7.0)
    mask = torch.arange(count + PADDING) < count
    return torch.cat((values, junk))[None], mask[None]


RUN: dict[str, Callable[[Any, Case, State], Parts]] = {
    "IGMTF": with_bank,
    "ADD": with_lessons,
    "ADARNN": with_gates,
    "TRA": with_routes,
    "TabNet": with_picks,
}


def main(python: str) -> list[Row]:
    """Print the table of the whole grid; the rows."""
    rows = compare(ask_qlib(python))
    for row in rows:
        print(row)
    return rows


if __name__ == "__main__":
    qlib_python = os.environ["QTORCH_QLIB_PYTHON"]
    if len(sys.argv) > 1:
        _run_qlib(qlib_python, Path(sys.argv[1]), EVERY)
    else:
        sys.exit(int(any(not row.passes for row in main(qlib_python))))
