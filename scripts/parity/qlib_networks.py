"""Run Qlib's networks on the cases and write the outputs as npz; needs pyqlib and torch.

python qlib_networks.py OUT.npz EVERY [FILE ...]
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from network_cases import (
    BANK_DAYS,
    ROUTER,
    Case,
    arrange_windows,
    cases,
    igmtf_lookup_sizes,
    inputs,
    weights,
)
from torch import Tensor, nn

# HIST reads the tensor's device with a function that does not support CPU tensors.
torch.get_device = lambda tensor: tensor.device.type

Inputs = dict[str, Tensor]
Parts = dict[str, Tensor]


def qlib_module(case: Case) -> Any:
    return importlib.import_module(f"qlib.contrib.model.{case.twin.qlib.split('.')[0]}")


def build_network(case: Case) -> nn.Module:
    return getattr(qlib_module(case), case.twin.qlib.split(".")[1])(
        **case.twin.qlib_arguments(case.sizes)
    )


def build_tra(case: Case) -> nn.Module:
    model = build_network(case)
    states = case.sizes["num_states"]
    tra = qlib_module(case).TRA(model.output_size, num_states=states, hidden_size=ROUTER)
    return nn.ModuleDict({"model": model, "tra": tra})


def build_tabnet(case: Case) -> nn.Module:
    encoder = build_network(case)
    return qlib_module(case).FinetuneModel(case.sizes["out_dim"], 1, encoder)


def run_default(network: nn.Module, x: Tensor, tensors: Inputs, case: Case) -> Parts:
    return {"score": network(x)}


def run_hist(network: nn.Module, x: Tensor, tensors: Inputs, case: Case) -> Parts:
    return {"score": network(x, tensors["concept"])}


def run_igmtf(network: nn.Module, x: Tensor, tensors: Inputs, case: Case) -> Parts:
    bank_states = np.empty(len(BANK_DAYS), dtype=object)
    for k in range(len(BANK_DAYS)):
        day = torch.from_numpy(arrange_windows(tensors[f"bank{k}"].numpy(), case.twin.feed))
        bank_states[k] = network(day, get_hidden=True)
    days = torch.cat([states.mean(0, keepdim=True) for states in bank_states])
    counts = igmtf_lookup_sizes(case.sizes)
    return {"score": network(x, train_hidden=bank_states, train_hidden_day=days, **counts)}


def run_adarnn(network: nn.Module, x: Tensor, tensors: Inputs, case: Case) -> Parts:
    parts = {"score": network.predict(x)}
    if len(x) % 2 == 0:  # two domains of equal size
        _, parts["distance"], gates = network.forward_pre_train(x)
        parts |= {f"gate{k}": gate for k, gate in enumerate(gates)}
    return parts


def run_tra(network: nn.Module, x: Tensor, tensors: Inputs, case: Case) -> Parts:
    predictor_scores, _, share = network["tra"](network["model"](x), tensors["errors"])
    return {
        "score": predictor_scores.gather(1, share.argmax(1, keepdim=True)),
        "each": predictor_scores,
        "share": share,
    }


def run_tabnet(network: nn.Module, x: Tensor, tensors: Inputs, case: Case) -> Parts:
    full_mask = torch.ones_like(x)
    encoder_output, sparsity = network.model(x, full_mask)
    return {"score": network(x, full_mask), "encoded": encoder_output, "sparsity": sparsity}


def run_add(network: nn.Module, x: Tensor, tensors: Inputs, case: Case) -> Parts:
    parts = network(x)
    return {"score": parts["excess"], **parts}


BUILD: dict[str, Callable[[Case], nn.Module]] = {
    "TRA": build_tra,
    "TabNet": build_tabnet,
}
RUN: dict[str, Callable[[nn.Module, Tensor, Inputs, Case], Parts]] = {
    "HIST": run_hist,
    "IGMTF": run_igmtf,
    "ADARNN": run_adarnn,
    "TRA": run_tra,
    "TabNet": run_tabnet,
    "ADD": run_add,
}


def fill_parameters(network: nn.Module) -> list[tuple[str, list[int]]]:
    """Set all parameters and norm statistics to generated values; return names and shapes."""
    tensors_by_name = dict(network.named_parameters())
    tensors_by_name |= {n: b for n, b in network.named_buffers() if ".running_" in n}
    shapes = [(name, list(value.shape)) for name, value in tensors_by_name.items()]
    for name, value in weights(shapes).items():
        tensors_by_name[name].data.copy_(torch.from_numpy(value))
    return shapes


def main() -> None:
    target, every, *only = sys.argv[1:]
    names, values, states = [], [], {}
    for case in cases(int(every), only or None):
        network = BUILD.get(case.twin.network, build_network)(case).eval()
        states[case.name] = fill_parameters(network)
        tensors = {name: torch.from_numpy(value) for name, value in inputs(case).items()}
        x = torch.from_numpy(arrange_windows(tensors["x"].numpy(), case.twin.feed))
        with torch.no_grad():
            parts = RUN.get(case.twin.network, run_default)(network, x, tensors, case)
        for part, value in parts.items():
            names.append(f"{case.name}|{part}")
            values.append(value.detach().numpy().astype(np.float32).reshape(-1))
    np.savez_compressed(
        target,
        names=np.frombuffer("\n".join(names).encode(), dtype=np.uint8),
        lengths=np.array([len(v) for v in values], dtype=np.int32),
        values=np.concatenate(values),
        states=np.frombuffer(json.dumps(states).encode(), dtype=np.uint8),
    )


if __name__ == "__main__":
    main()
