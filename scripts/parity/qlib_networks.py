"""Run by a Python with pyqlib and torch: what Qlib's networks make of the cases, as npz.

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
from network_cases import BANK_DAYS, ROUTER, Case, cases, few, inputs, laid_out, weights
from torch import Tensor, nn

# HIST asks the tensor's device by a call that knows no CPU.
torch.get_device = lambda tensor: tensor.device.type

Given = dict[str, Tensor]
Parts = dict[str, Tensor]


def module_of(case: Case) -> Any:
    return importlib.import_module(f"qlib.contrib.model.{case.twin.qlib.split('.')[0]}")


def plain(case: Case) -> nn.Module:
    return getattr(module_of(case), case.twin.qlib.split(".")[1])(**case.twin.theirs(case.sizes))


def backbone_and_router(case: Case) -> nn.Module:
    model = plain(case)
    states = case.sizes["num_states"]
    tra = module_of(case).TRA(model.output_size, num_states=states, hidden_size=ROUTER)
    return nn.ModuleDict({"model": model, "tra": tra})


def encoder_with_head(case: Case) -> nn.Module:
    encoder = plain(case)
    return module_of(case).FinetuneModel(case.sizes["out_dim"], 1, encoder)


def one(network: nn.Module, x: Tensor, given: Given, case: Case) -> Parts:
    return {"score": network(x)}


def with_concepts(network: nn.Module, x: Tensor, given: Given, case: Case) -> Parts:
    return {"score": network(x, given["concept"])}


def with_bank(network: nn.Module, x: Tensor, given: Given, case: Case) -> Parts:
    kept = np.empty(len(BANK_DAYS), dtype=object)
    for k in range(len(BANK_DAYS)):
        day = torch.from_numpy(laid_out(given[f"bank{k}"].numpy(), case.twin.feed))
        kept[k] = network(day, get_hidden=True)
    days = torch.cat([states.mean(0, keepdim=True) for states in kept])
    counts = few(case.sizes)
    return {"score": network(x, train_hidden=kept, train_hidden_day=days, **counts)}


def predicted(network: nn.Module, x: Tensor, given: Given, case: Case) -> Parts:
    parts = {"score": network.predict(x)}
    if len(x) % 2 == 0:  # two domains of one size
        _, parts["distance"], gates = network.forward_pre_train(x)
        parts |= {f"gate{k}": gate for k, gate in enumerate(gates)}
    return parts


def routed(network: nn.Module, x: Tensor, given: Given, case: Case) -> Parts:
    each, _, share = network["tra"](network["model"](x), given["errors"])
    return {"score": each.gather(1, share.argmax(1, keepdim=True)), "each": each, "share": share}


def masked(network: nn.Module, x: Tensor, given: Given, case: Case) -> Parts:
    everything = torch.ones_like(x)
    encoded, sparsity = network.model(x, everything)
    return {"score": network(x, everything), "encoded": encoded, "sparsity": sparsity}


def decoded(network: nn.Module, x: Tensor, given: Given, case: Case) -> Parts:
    parts = network(x)
    return {"score": parts["excess"], **parts}


BUILD: dict[str, Callable[[Case], nn.Module]] = {
    "TRA": backbone_and_router,
    "TabNet": encoder_with_head,
}
RUN: dict[str, Callable[[nn.Module, Tensor, Given, Case], Parts]] = {
    "HIST": with_concepts,
    "IGMTF": with_bank,
    "ADARNN": predicted,
    "TRA": routed,
    "TabNet": masked,
    "ADD": decoded,
}


def fill(network: nn.Module) -> list[tuple[str, list[int]]]:
    """Give each parameter its values; their names and shapes, the norms' statistics too."""
    held = dict(network.named_parameters())
    held |= {n: b for n, b in network.named_buffers() if ".running_" in n}
    shapes = [(name, list(value.shape)) for name, value in held.items()]
    for name, value in weights(shapes).items():
        held[name].data.copy_(torch.from_numpy(value))
    return shapes


def main() -> None:
    target, every, *only = sys.argv[1:]
    names, values, states = [], [], {}
    for case in cases(int(every), only or None):
        network = BUILD.get(case.twin.ours, plain)(case).eval()
        states[case.name] = fill(network)
        given = {name: torch.from_numpy(value) for name, value in inputs(case).items()}
        x = torch.from_numpy(laid_out(given["x"].numpy(), case.twin.feed))
        with torch.no_grad():
            parts = RUN.get(case.twin.ours, one)(network, x, given, case)
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
