"""A network's parameters as Qlib names them, under qtorch's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from network_cases import Sizes
from torch import Tensor

State = dict[str, Tensor]

# Patterns of names and what stands there instead; None is a parameter that no score depends on.
# The first that fits a name is taken.
NAMES: dict[str, tuple[tuple[str, str | None], ...]] = {
    "ALSTM": (
        (r"^net\.fc_in", "embed"),
        (r"^att_net\.att_fc_in", "attend"),
        (r"^att_net\.att_fc_out", "relevance"),
    ),
    "TCN": ((r"^tcn\.network", "blocks"),),
    "Transformer": ((r"^encoder_layer\.", None),),
    "Localformer": (
        (r"^encoder_layer\.", None),
        (r"^transformer_encoder\.", ""),
    ),
    "KRNN": (
        (r"^encoder\.cnn_encoder\.", "encoder."),
        (r"^encoder\.krnn_encoder\.rnn_modules", "encoder.rnns"),
    ),
    "Sandwich": (
        (r"_encoder\.cnn_encoder\.", "_encoder."),
        (r"_encoder\.krnn_encoder\.rnn_modules", "_encoder.rnns"),
    ),
    "HIST": ((r"^fc_(es_middle|is_middle|indi_fore|out_es|out_is|out_indi)\.", None),),
    "IGMTF": ((r"^fc_output\.", None),),
    "ADD": ((r"^(enc_market|pred_market|adv_market|adv_excess|dec)\.", None),),
    "ADARNN": ((r"^(gate|bn_lst)\.", None),),
    "TRA": ((r"^tra\.", ""),),
    "TabNet": ((r"^model\.", ""), (r"^fc\.", "fc_out.")),
}


def mlp(state: State, sizes: Sizes) -> State:
    """Qlib nests linear layer, norm and activation; here all layers are in one row."""
    blocks, made = sizes["num_layers"], {}
    for name, value in state.items():
        _, block, rest = name.split(".", 2)
        if int(block) <= blocks:
            part, rest = rest.split(".", 1)
            made[f"layers.{3 * (int(block) - 1) + 1 + int(part)}.{rest}"] = value
        else:
            made[f"layers.{3 * blocks + 2}.{rest}"] = value
    return made


def sfm(state: State, sizes: Sizes) -> State:
    """Qlib's matrices stand the other way round, one for each gate."""
    gates = ("i", "ste", "c", "o", "fre")
    return {
        "gates.weight": torch.cat([state[f"W_{g}"].t() for g in gates]),
        "gates.bias": torch.cat([state[f"b_{g}"] for g in gates]),
        "recur.weight": torch.cat([state[f"U_{g}"].t() for g in gates]),
        "amplitude": state["U_a"],
        "amplitude_bias": state["b_a"],
        "project.weight": state["W_p"].t(),
        "project.bias": state["b_p"],
        **{name: value for name, value in state.items() if name.startswith("fc_out.")},
    }


FORMS: dict[str, Callable[[State, Sizes], State]] = {"MLP": mlp, "SFM": sfm}


def to_ours(network: str, state: Mapping[str, Tensor], sizes: Sizes) -> State:
    """Qlib's parameters by qtorch's names, without those that nothing reads."""
    if network in FORMS:
        return FORMS[network](dict(state), sizes)
    made = {}
    for name, value in state.items():
        found = _renamed(name, NAMES.get(network, ()))
        if found is not None:
            made[found] = value
    return made


def _renamed(name: str, patterns: tuple[tuple[str, str | None], ...]) -> str | None:
    for pattern, instead in patterns:
        if re.search(pattern, name):
            return None if instead is None else re.sub(pattern, instead, name)
    return name
