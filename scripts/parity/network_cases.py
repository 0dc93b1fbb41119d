"""Cases for comparing qtorch's networks with Qlib's over a grid of sizes; used on both sides.

Weights and inputs are generated from names, so that only Qlib's outputs and the names and shapes
of its parameters have to be stored. To add a network, add an entry to TWINS and its parameter
names to `network_weights.py`; if it is called with more than `x`, also a line to
`qlib_networks.py` and `networks.py`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

Sizes = Mapping[str, Any]
Arguments = Callable[[Sizes], dict[str, Any]]
NUM_CONCEPTS, BANK_DAYS = 5, (3, 7, 4, 5, 3, 6)
NUM_ERRORS, ROUTER = 4, 5  # number of past errors that TRA gets; width of its router

BASE = {
    "d_feat": (3, 6),
    "hidden_size": (4, 8),
    "num_layers": (1, 2),
    "step_len": (1, 5, 20),
    "batch": (1, 2, 7),
}
RNN = {"base_model": ("GRU", "LSTM")}


@dataclass(frozen=True)
class Twin:
    """A network of qtorch (`network`, a class of qtorch.nn) and of Qlib (`qlib`, `module.Class`).

    `feed` is the layout of the windows for Qlib's network: "by feature" and "by step" are flat,
    "window" is `[N, T, F]`, "channels" `[N, F, T]`. `qlib_arguments` and `arguments` build the
    arguments of the two constructors from the sizes of a case.
    """

    network: str
    qlib: str
    feed: str
    qlib_arguments: Arguments
    arguments: Arguments
    grid_values: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One point in the grid of a network pair."""

    name: str
    twin: Twin
    sizes: Sizes


def _take_sizes(*names: str, **aliases: str) -> Arguments:
    """Use sizes as arguments, under their own names or under others (`argument="size"`)."""
    return lambda s: {n: s[n] for n in names} | {to: s[n] for to, n in aliases.items()}


_STACK = ("d_feat", "hidden_size", "num_layers")
_ATTENTION = _take_sizes("d_feat", "num_layers", "nhead", d_model="hidden_size")


def _without_dropout(arguments: Arguments) -> Arguments:
    return lambda s: {**arguments(s), "dropout": 0.0}


def _cnn_rnn_arguments(cnn: tuple[str, ...], rnn: tuple[str, ...], feature: str) -> Arguments:
    """Arguments of KRNN and Sandwich; all widths differ, so that mixing them up is noticed."""
    return lambda s: {
        feature: s["d_feat"],
        **{n: s["hidden_size"] + 1 + k for k, n in enumerate(cnn)},
        **{n: s["hidden_size"] - k for k, n in enumerate(rnn)},
        "rnn_layers": s["num_layers"],
        "rnn_dups": s["rnn_dups"],
        "cnn_kernel_size": s["cnn_kernel_size"],
        "dropout": 0.0,
        **({"device": "cpu"} if feature == "fea_dim" else {}),
    }


def _widths(s: Sizes) -> list[int]:
    return [s["hidden_size"] + k for k in range(s["num_layers"])]


def _krnn_arguments(feature: str) -> Arguments:
    return _cnn_rnn_arguments(("cnn_dim",), ("rnn_dim",), feature)


def _sandwich_arguments(feature: str) -> Arguments:
    return _cnn_rnn_arguments(("cnn_dim_1", "cnn_dim_2"), ("rnn_dim_1", "rnn_dim_2"), feature)


def _with_router(arguments: Arguments) -> Arguments:
    """Add the arguments of the router that `qlib_networks.py` builds for TRA."""
    return lambda s: arguments(s) | {"router_size": ROUTER, "lookback": NUM_ERRORS}


def igmtf_lookup_sizes(s: Sizes) -> dict[str, int]:
    """The numbers of days and of neighbours that IGMTF looks up."""
    return {"k_day": s["k_day"], "n_neighbor": 7 - s["k_day"]}


def _twins() -> dict[str, Twin]:
    """The network pairs by Qlib's file, including networks with their own training step."""
    stack, rnn = _take_sizes(*_STACK), _take_sizes(*_STACK, "base_model")
    alstm = _take_sizes(*_STACK, "rnn_type")
    tcn = {"hidden_size": (6, 8), "kernel_size": (2, 5)}
    cnn_grid = {"rnn_dups": (1, 3), "cnn_kernel_size": (1, 3)}
    sfm = _take_sizes("d_feat", "hidden_size", "freq_dim", "output_dim")

    def qlib_tcn_arguments(s: Sizes) -> dict[str, Any]:
        channels = [s["hidden_size"]] * s["num_layers"]
        sizes = {"num_input": s["d_feat"], "output_size": 1, "num_channels": channels}
        return {**sizes, "kernel_size": s["kernel_size"], "dropout": 0.0}

    tcn_arguments = _without_dropout(
        _take_sizes("d_feat", "num_layers", "kernel_size", n_chans="hidden_size")
    )
    twins = {
        "pytorch_nn": Twin(
            "MLP",
            "pytorch_nn.Net",
            "by feature",
            lambda s: {
                "input_dim": s["d_feat"] * s["step_len"],
                "layers": _widths(s),
                "act": s["act"],
            },
            lambda s: {
                "d_feat": s["d_feat"] * s["step_len"],
                "layers": _widths(s),
                "act": s["act"],
            },
            {"act": ("LeakyReLU", "SiLU")},
        ),
        "pytorch_sfm": Twin(
            "SFM",
            "pytorch_sfm.SFM_Model",
            "by feature",
            sfm,
            sfm,
            {"num_layers": (1,), "freq_dim": (3, 10), "output_dim": (1, 2)},
        ),
        "pytorch_krnn": Twin(
            "KRNN",
            "pytorch_krnn.KRNNModel",
            "by step",
            _krnn_arguments("fea_dim"),
            _krnn_arguments("d_feat"),
            cnn_grid,
        ),
        "pytorch_sandwich": Twin(
            "Sandwich",
            "pytorch_sandwich.SandwichModel",
            "by step",
            _sandwich_arguments("fea_dim"),
            _sandwich_arguments("d_feat"),
            cnn_grid,
        ),
        "pytorch_hist": Twin("HIST", "pytorch_hist.HISTModel", "by feature", rnn, rnn, RNN),
        "pytorch_igmtf": Twin(
            "IGMTF",
            "pytorch_igmtf.IGMTFModel",
            "by feature",
            rnn,
            lambda s: rnn(s) | igmtf_lookup_sizes(s),
            {**RNN, "k_day": (2, 4)},
        ),
    }
    twins_with_ts = {
        "lstm": ("LSTM", "LSTMModel", stack, stack, {}),
        "gru": ("GRU", "GRUModel", stack, stack, {}),
        "alstm": ("ALSTM", "ALSTMModel", alstm, alstm, {"rnn_type": ("GRU", "LSTM")}),
        "tcn": ("TCN", "TCNModel", qlib_tcn_arguments, tcn_arguments, tcn),
        "transformer": ("Transformer", "Transformer", _ATTENTION, _ATTENTION, {"nhead": (1, 2)}),
        "localformer": ("Localformer", "Transformer", _ATTENTION, _ATTENTION, {"nhead": (1, 2)}),
        "gats": ("GATs", "GATModel", rnn, rnn, RNN),
    }
    for file, (
        network,
        qlib_class,
        qlib_arguments,
        arguments,
        grid_values,
    ) in twins_with_ts.items():
        for name in (f"pytorch_{file}", f"pytorch_{file}_ts"):
            feed = "by feature"
            if name.endswith("_ts"):
                feed = "channels" if file == "tcn" else "window"
            twins[name] = Twin(
                network, f"{name}.{qlib_class}", feed, qlib_arguments, arguments, grid_values
            )
    return twins | _twins_with_training_step()


def _twins_with_training_step() -> dict[str, Twin]:
    """The pairs of networks that have their own training step."""
    rnn, stack = _take_sizes(*_STACK, "base_model"), _take_sizes(*_STACK)
    tabnet = ("out_dim", "n_d", "n_a", "n_shared", "n_ind", "n_steps")
    errors = {"num_states": (2, 3)}

    def adarnn(s: Sizes) -> dict[str, Any]:
        widths = [s["hidden_size"]] * s["num_layers"]
        sizes = {"n_input": s["d_feat"], "n_hiddens": widths, "len_seq": s["step_len"]}
        return {**sizes, "n_output": 1, "trans_loss": "mmd", "GPU": -1}

    return {
        "pytorch_add": Twin(
            "ADD",
            "pytorch_add.ADDModel",
            "by feature",
            lambda s: rnn(s) | {"dec_dropout": 0.0},
            rnn,
            {**RNN, "step_len": (2, 5, 20)},  # Qlib's network needs at least two steps
        ),
        "pytorch_adarnn": Twin(
            "ADARNN",
            "pytorch_adarnn.AdaRNN",
            "window",
            adarnn,
            stack,
            # Qlib's gates need two steps, and its two domains are the halves of a batch.
            {"step_len": (2, 5, 20), "batch": (1, 2, 8)},
        ),
        "pytorch_tcts": Twin("TCTS", "pytorch_tcts.GRUModel", "by feature", stack, stack, {}),
        "pytorch_tra": Twin(
            "TRA",
            "pytorch_tra.RNN",
            "window",
            _take_sizes(
                "hidden_size", "num_layers", "use_attn", input_size="d_feat", rnn_arch="base_model"
            ),
            _with_router(_take_sizes(*_STACK, "use_attn", "num_states", rnn_arch="base_model")),
            {**RNN, **errors, "use_attn": (True, False)},
        ),
        "pytorch_tra (Transformer)": Twin(
            "TRA",
            "pytorch_tra.Transformer",
            "window",
            _take_sizes("hidden_size", "num_layers", input_size="d_feat", num_heads="nhead"),
            _with_router(_take_sizes(*_STACK, "nhead", "num_states", backbone="backbone")),
            {**errors, "d_feat": (4, 6), "nhead": (1, 2), "backbone": ("Transformer",)},
        ),
        "pytorch_tabnet": Twin(
            "TabNet",
            "pytorch_tabnet.TabNet",
            "by feature",
            _take_sizes(*tabnet, inp_dim="d_feat"),
            # As in Qlib, the masks of earlier steps have no influence.
            lambda s: _take_sizes("d_feat", *tabnet)(s) | {"relax": None},
            {
                "num_layers": (1,),
                "hidden_size": (1,),
                "step_len": (1,),
                "d_feat": (5, 12),
                "out_dim": (4, 8),
                "n_d": (3, 6),
                "n_a": (4,),
                "n_shared": (1, 2),  # without a shared layer Qlib adds tensors of different widths
                "n_ind": (2, 3),
                "n_steps": (2, 3, 5),
            },
        ),
    }


TWINS = _twins()


def cases(every: int = 1, only: Iterable[str] | None = None) -> list[Case]:
    """All grid points of each network pair, or every `every`-th of them."""
    case_list = []
    for file, twin in TWINS.items():
        if only is not None and file not in only:
            continue
        grid = {**BASE, **twin.grid_values}
        for point in list(product(*grid.values()))[::every]:
            sizes = dict(zip(grid, point, strict=True))
            text = " ".join(f"{k}={v}" for k, v in sizes.items())
            case_list.append(Case(f"{file}: {text}", twin, sizes))
    return case_list


def weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Generate the values of parameters (and of norm statistics) from their names."""
    values_by_name = {}
    for name, shape in shapes:
        values = _random_state(name).uniform(-1, 1, size=tuple(shape))
        if len(shape) > 1:  # about torch's initial scale, so that signals pass through the network
            values *= 1.7 / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(("running_var", "weight")):
            values = 1 + 0.4 * values
        values_by_name[name] = values.astype(np.float32)
    return values_by_name


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Generate the inputs of a case: `x [N, T, F]` and the extra inputs of some networks.

    HIST: `concept [N, K]`, with an empty last concept and one instrument without concepts. IGMTF:
    the windows of past days, `bank0` and so on. TRA: the past errors.
    """
    random, sizes = _random_state(case.name), case.sizes
    shape = (sizes["step_len"], sizes["d_feat"])
    arrays = {"x": _windows(random, sizes["batch"], shape)}
    if case.twin.network == "HIST":
        concept = (random.random_sample((sizes["batch"], NUM_CONCEPTS)) > 0.5).astype(np.float32)
        concept[:, -1] = 0
        concept[0] = 0
        arrays["concept"] = concept
    if case.twin.network == "IGMTF":
        arrays |= {f"bank{k}": _windows(random, n, shape) for k, n in enumerate(BANK_DAYS)}
    if case.twin.network == "TRA":
        errors = random.random_sample((sizes["batch"], NUM_ERRORS, sizes["num_states"]))
        arrays["errors"] = errors.astype(np.float32)
    return arrays


def arrange_windows(x: np.ndarray, feed: str) -> np.ndarray:
    """Arrange windows `[N, T, F]` in the layout of a Qlib network."""
    if feed == "window":
        return x
    if feed == "by step":
        return x.reshape(len(x), -1)
    channels = np.ascontiguousarray(x.transpose(0, 2, 1))
    return channels if feed == "channels" else channels.reshape(len(x), -1)


def _windows(random: np.random.RandomState, count: int, shape: tuple[int, int]) -> np.ndarray:
    return random.standard_normal((count, *shape)).astype(np.float32)


def _random_state(name: str) -> np.random.RandomState:
    # RandomState is the numpy generator whose stream is guaranteed never to change.
    return np.random.RandomState(zlib.crc32(name.encode()))
