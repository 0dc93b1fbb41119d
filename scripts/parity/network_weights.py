"""Convert the parameters of Qlib's networks to qtorch's names and layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from network_cases import Sizes
from torch import Tensor

State = dict[str, Tensor]

# Patterns of parameter names and their replacements; None marks parameters that do not influence
# the score. The first matching pattern is used.
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


def convert_mlp(state: State, sizes: Sizes) -> State:
    """Qlib nests linear layer, norm and activation in blocks; qtorch has one list of layers."""
    blocks, converted_state = sizes["num_layers"], {}
    for name, value in state.items():
        _, block, parameter = name.split(".", 2)
        if int(block) <= blocks:
            part, parameter = parameter.split(".", 1)
            converted_state[f"layers.{3 * (int(block) - 1) + 1 + int(part)}.{parameter}"] = value
        else:
            converted_state[f"layers.{3 * blocks + 2}.{parameter}"] = value
    return converted_state


def convert_sfm(state: State, sizes: Sizes) -> State:
    """Qlib has one transposed matrix per gate; qtorch has one matrix for all gates."""
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


CONVERTERS: dict[str, Callable[[State, Sizes], State]] = {"MLP": convert_mlp, "SFM": convert_sfm}


def convert_weights(network: str, state: Mapping[str, Tensor], sizes: Sizes) -> State:
    """Rename Qlib's parameters to qtorch's names and drop those that are not used."""
    if network in CONVERTERS:
        return CONVERTERS[network](dict(state), sizes)
    converted_state = {}
    for name, value in state.items():
        new_name = _convert_name(name, NAMES.get(network, ()))
        if new_name is not None:
            converted_state[new_name] = value
    return converted_state


def _convert_name(name: str, patterns: tuple[tuple[str, str | None], ...]) -> str | None:
    for pattern, replacement in patterns:
        if re.search(pattern, name):
            return None if replacement is None else re.sub(pattern, replacement, name)
    return name
