"""Qlib's networks beside qtorch's over a grid of sizes: what the Pythons of both sides read.

Weights and inputs are functions of names, so that nothing but Qlib's outputs, and the names and
shapes of its parameters, has to be kept. A network more is an entry of TWINS, its names in
`network_weights.py`, and, where a call takes more than `x`, a line in `qlib_networks.py` and
`networks.py`.
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
NUM_ERRORS, ROUTER = 4, 5  # past steps whose errors TRA is told; its router's width

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
    """A network of qtorch (`ours`, by its class in qtorch.nn) and of Qlib (`module.Class`).

    `feed` says how Qlib's wants its windows: "by feature" and "by step" are flat, "window" is
    `[N, T, F]`, "channels" `[N, F, T]`. `theirs` and `own` make the constructors' arguments.
    """

    ours: str
    qlib: str
    feed: str
    theirs: Arguments
    own: Arguments
    varied: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One point of a twin's grid."""

    name: str
    twin: Twin
    sizes: Sizes


def _named(*names: str, **renamed: str) -> Arguments:
    """Arguments that are sizes, by their own names or by others (`theirs=ours`)."""
    return lambda s: {n: s[n] for n in names} | {to: s[n] for to, n in renamed.items()}


_STACK = ("d_feat", "hidden_size", "num_layers")
_ATTENTION = _named("d_feat", "num_layers", "nhead", d_model="hidden_size")


def _without_dropout(arguments: Arguments) -> Arguments:
    return lambda s: {**arguments(s), "dropout": 0.0}


def _side_by_side(cnn: tuple[str, ...], rnn: tuple[str, ...], feature: str) -> Arguments:
    """KRNN's and Sandwich's: the widths differ, so that none can stand for another."""
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


def _krnn(feature: str) -> Arguments:
    return _side_by_side(("cnn_dim",), ("rnn_dim",), feature)


def _sandwich(feature: str) -> Arguments:
    return _side_by_side(("cnn_dim_1", "cnn_dim_2"), ("rnn_dim_1", "rnn_dim_2"), feature)


def _router(arguments: Arguments) -> Arguments:
    """TRA's, with the router that `qlib_networks.py` builds."""
    return lambda s: arguments(s) | {"router_size": ROUTER, "lookback": NUM_ERRORS}


def few(s: Sizes) -> dict[str, int]:
    """How many days and neighbours IGMTF looks up."""
    return {"k_day": s["k_day"], "n_neighbor": 7 - s["k_day"]}


def _twins() -> dict[str, Twin]:
    """By Qlib's file: all that qtorch has beside Qlib's, and those of its files that train a
    network in a step of their own."""
    stack, rnn = _named(*_STACK), _named(*_STACK, "base_model")
    alstm = _named(*_STACK, "rnn_type")
    tcn = {"hidden_size": (6, 8), "kernel_size": (2, 5)}
    dups = {"rnn_dups": (1, 3), "cnn_kernel_size": (1, 3)}
    sfm = _named("d_feat", "hidden_size", "freq_dim", "output_dim")

    def tcn_of_qlib(s: Sizes) -> dict[str, Any]:
        channels = [s["hidden_size"]] * s["num_layers"]
        sizes = {"num_input": s["d_feat"], "output_size": 1, "num_channels": channels}
        return {**sizes, "kernel_size": s["kernel_size"], "dropout": 0.0}

    own_tcn = _without_dropout(_named("d_feat", "num_layers", "kernel_size", n_chans="hidden_size"))
    made = {
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
            "KRNN", "pytorch_krnn.KRNNModel", "by step", _krnn("fea_dim"), _krnn("d_feat"), dups
        ),
        "pytorch_sandwich": Twin(
            "Sandwich",
            "pytorch_sandwich.SandwichModel",
            "by step",
            _sandwich("fea_dim"),
            _sandwich("d_feat"),
            dups,
        ),
        "pytorch_hist": Twin("HIST", "pytorch_hist.HISTModel", "by feature", rnn, rnn, RNN),
        "pytorch_igmtf": Twin(
            "IGMTF",
            "pytorch_igmtf.IGMTFModel",
            "by feature",
            rnn,
            lambda s: rnn(s) | few(s),
            {**RNN, "k_day": (2, 4)},
        ),
    }
    doubled = {
        "lstm": ("LSTM", "LSTMModel", stack, stack, {}),
        "gru": ("GRU", "GRUModel", stack, stack, {}),
        "alstm": ("ALSTM", "ALSTMModel", alstm, alstm, {"rnn_type": ("GRU", "LSTM")}),
        "tcn": ("TCN", "TCNModel", tcn_of_qlib, own_tcn, tcn),
        "transformer": ("Transformer", "Transformer", _ATTENTION, _ATTENTION, {"nhead": (1, 2)}),
        "localformer": ("Localformer", "Transformer", _ATTENTION, _ATTENTION, {"nhead": (1, 2)}),
        "gats": ("GATs", "GATModel", rnn, rnn, RNN),
    }
    for file, (ours, theirs, of_qlib, own, varied) in doubled.items():
        for name in (f"pytorch_{file}", f"pytorch_{file}_ts"):
            feed = "by feature"
            if name.endswith("_ts"):
                feed = "channels" if file == "tcn" else "window"
            made[name] = Twin(ours, f"{name}.{theirs}", feed, of_qlib, own, varied)
    return made | _own_steps()


def _own_steps() -> dict[str, Twin]:
    """Networks whose training step is their own."""
    rnn, stack = _named(*_STACK, "base_model"), _named(*_STACK)
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
            {**RNN, "step_len": (2, 5, 20)},  # Qlib takes its form from the second step
        ),
        "pytorch_adarnn": Twin(
            "ADARNN",
            "pytorch_adarnn.AdaRNN",
            "window",
            adarnn,
            stack,
            # Qlib's gates need two steps, and its domains are the halves of a batch.
            {"step_len": (2, 5, 20), "batch": (1, 2, 8)},
        ),
        "pytorch_tcts": Twin("TCTS", "pytorch_tcts.GRUModel", "by feature", stack, stack, {}),
        "pytorch_tra": Twin(
            "TRA",
            "pytorch_tra.RNN",
            "window",
            _named(
                "hidden_size", "num_layers", "use_attn", input_size="d_feat", rnn_arch="base_model"
            ),
            _router(_named(*_STACK, "use_attn", "num_states", rnn_arch="base_model")),
            {**RNN, **errors, "use_attn": (True, False)},
        ),
        "pytorch_tra (Transformer)": Twin(
            "TRA",
            "pytorch_tra.Transformer",
            "window",
            _named("hidden_size", "num_layers", input_size="d_feat", num_heads="nhead"),
            _router(_named(*_STACK, "nhead", "num_states", backbone="backbone")),
            {**errors, "d_feat": (4, 6), "nhead": (1, 2), "backbone": ("Transformer",)},
        ),
        "pytorch_tabnet": Twin(
            "TabNet",
            "pytorch_tabnet.TabNet",
            "by feature",
            _named(*tabnet, inp_dim="d_feat"),
            # As Qlib has it: nothing is remembered of what was picked.
            lambda s: _named("d_feat", *tabnet)(s) | {"relax": None},
            {
                "num_layers": (1,),
                "hidden_size": (1,),
                "step_len": (1,),
                "d_feat": (5, 12),
                "out_dim": (4, 8),
                "n_d": (3, 6),
                "n_a": (4,),
                "n_shared": (1, 2),  # without one Qlib adds what has another width
                "n_ind": (2, 3),
                "n_steps": (2, 3, 5),
            },
        ),
    }


TWINS = _twins()


def cases(every: int = 1, only: Iterable[str] | None = None) -> list[Case]:
    """The grid of each twin, or each `every`-th point of it."""
    found = []
    for file, twin in TWINS.items():
        if only is not None and file not in only:
            continue
        grid = {**BASE, **twin.varied}
        for point in list(product(*grid.values()))[::every]:
            sizes = dict(zip(grid, point, strict=True))
            shown = " ".join(f"{k}={v}" for k, v in sizes.items())
            found.append(Case(f"{file}: {shown}", twin, sizes))
    return found


def weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Values for parameters (and a norm's statistics) that follow from their names."""
    made = {}
    for name, shape in shapes:
        drawn = _draw(name).uniform(-1, 1, size=tuple(shape))
        if len(shape) > 1:  # about as wide as torch begins, so that what goes in comes out
            drawn *= 1.7 / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(("running_var", "weight")):
            drawn = 1 + 0.4 * drawn
        made[name] = drawn.astype(np.float32)
    return made


def inputs(case: Case) -> dict[str, np.ndarray]:
    """`x [N, T, F]`, and what some networks take besides: `concept [N, K]`, of which the last is
    empty and one instrument has none; the past days' windows `bank`; the past errors."""
    drawn, sizes = _draw(case.name), case.sizes
    form = (sizes["step_len"], sizes["d_feat"])
    made = {"x": _windows(drawn, sizes["batch"], form)}
    if case.twin.ours == "HIST":
        concept = (drawn.random_sample((sizes["batch"], NUM_CONCEPTS)) > 0.5).astype(np.float32)
        concept[:, -1] = 0
        concept[0] = 0
        made["concept"] = concept
    if case.twin.ours == "IGMTF":
        made |= {f"bank{k}": _windows(drawn, n, form) for k, n in enumerate(BANK_DAYS)}
    if case.twin.ours == "TRA":
        errors = drawn.random_sample((sizes["batch"], NUM_ERRORS, sizes["num_states"]))
        made["errors"] = errors.astype(np.float32)
    return made


def laid_out(x: np.ndarray, feed: str) -> np.ndarray:
    """Windows `[N, T, F]` as a network of Qlib's wants them."""
    if feed == "window":
        return x
    if feed == "by step":
        return x.reshape(len(x), -1)
    channels = np.ascontiguousarray(x.transpose(0, 2, 1))
    return channels if feed == "channels" else channels.reshape(len(x), -1)


def _windows(drawn: np.random.RandomState, count: int, form: tuple[int, int]) -> np.ndarray:
    return drawn.standard_normal((count, *form)).astype(np.float32)


def _draw(name: str) -> np.random.RandomState:
    # Of numpy's generators the one whose stream never changes.
    return np.random.RandomState(zlib.crc32(name.encode()))
