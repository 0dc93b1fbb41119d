"""Alpha101: the 101 formulaic alphas of Kakushadze (2016), and their handler.

The formulas are those of the appendix of "101 Formulaic Alphas" (arXiv 1601.00991), with windows
rounded down as the paper says. Where the paper leaves a choice:

- a window uses the values that it contains, as everywhere in the language, also before it is full;
- `rank` and `Ts_Rank` are fractions in (0, 1], and ties get their average rank;
- `Ts_ArgMax` and `Ts_ArgMin` are positions in the window, from 1 for its oldest row;
- `min` and `max` with a number of days are rolling, those of two series take each day's smaller
  or larger value;
- a comparison is 0 or 1, and false if a value is missing;
- a correlation over two days, which is -1 or 1, is computed without rounding errors;
- `adv{d}` is the mean of `dollar_volume` over d days.

The tests compare all columns with the paper's formulas in plain pandas. KunQuant has 82 of them,
and departs from the paper in 47: `scripts/parity/alpha101.py` names and checks each difference.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtorch.core.errors import ConfigError, unknown_name_message
from qtorch.data.handler.alpha import (
    FEATURE,
    LEARN_PROCESSORS,
    AlphaDL,
    AlphaHandler,
    Features,
    select_features,
)
from qtorch.data.handler.handler import DataHandlerLP
from qtorch.data.panel.view import View
from qtorch.data.processor.base import Names
from qtorch.data.source.base import Source

log = logging.getLogger(__name__)

GROUPS = ("sector", "industry", "subindustry")
"""The classifications that some formulas neutralise by, from coarse to fine."""
DOLLAR_VOLUME = "$close*$volume"

INFER_PROCESSORS_101: tuple[Any, ...] = ({"class": "ProcessInf", "kwargs": {}},)

_PLACEHOLDER = re.compile(r"\{([a-z]+)(\d*)\}")

# {returns} is the daily return, {adv20} the mean dollar volume of 20 days, {cap} the market
# capitalisation, and {sector} the second argument of CSDemean.
FORMULAS: dict[int, str] = {
    1: (
        "CSRank(ArgMax(Sign(If({returns} < 0, Std({returns}, 20), $close))*Abs(If({returns} < "
        "0, Std({returns}, 20), $close)) ** 2, 5)) - 0.5"
    ),
    2: "-1*Corr(CSRank(Delta(Log($volume), 2)), CSRank(($close - $open)/$open), 6)",
    3: "-1*Corr(CSRank($open), CSRank($volume), 10)",
    4: "-1*Rank(CSRank($low), 9)",
    5: "CSRank($open - Sum($vwap, 10)/10)*(-1*Abs(CSRank($close - $vwap)))",
    6: "-1*Corr($open, $volume, 10)",
    7: "If({adv20} < $volume, -1*Rank(Abs(Delta($close, 7)), 60)*Sign(Delta($close, 7)), -1)",
    8: "-1*CSRank(Sum($open, 5)*Sum({returns}, 5) - Ref(Sum($open, 5)*Sum({returns}, 5), 10))",
    9: (
        "If(0 < Min(Delta($close, 1), 5), Delta($close, 1), If(Max(Delta($close, 1), 5) < 0, "
        "Delta($close, 1), -1*Delta($close, 1)))"
    ),
    10: (
        "CSRank(If(0 < Min(Delta($close, 1), 4), Delta($close, 1), If(Max(Delta($close, 1), 4) "
        "< 0, Delta($close, 1), -1*Delta($close, 1))))"
    ),
    11: (
        "(CSRank(Max($vwap - $close, 3)) + CSRank(Min($vwap - $close, "
        "3)))*CSRank(Delta($volume, 3))"
    ),
    12: "Sign(Delta($volume, 1))*(-1*Delta($close, 1))",
    13: "-1*CSRank(Cov(CSRank($close), CSRank($volume), 5))",
    14: "-1*CSRank(Delta({returns}, 3))*Corr($open, $volume, 10)",
    15: "-1*Sum(CSRank(Corr(CSRank($high), CSRank($volume), 3)), 3)",
    16: "-1*CSRank(Cov(CSRank($high), CSRank($volume), 5))",
    17: (
        "-1*CSRank(Rank($close, 10))*CSRank(Delta(Delta($close, 1), "
        "1))*CSRank(Rank($volume/{adv20}, 5))"
    ),
    18: "-1*CSRank(Std(Abs($close - $open), 5) + ($close - $open) + Corr($close, $open, 10))",
    19: "-1*Sign($close - Ref($close, 7) + Delta($close, 7))*(1 + CSRank(1 + Sum({returns}, 250)))",
    20: (
        "-1*CSRank($open - Ref($high, 1))*CSRank($open - Ref($close, 1))*CSRank($open - "
        "Ref($low, 1))"
    ),
    21: (
        "If(Sum($close, 8)/8 + Std($close, 8) < Sum($close, 2)/2, -1, If(Sum($close, 2)/2 < "
        "Sum($close, 8)/8 - Std($close, 8), 1, If((1 < $volume/{adv20}) | ($volume/{adv20} == "
        "1), 1, -1)))"
    ),
    22: "-1*(Delta(Corr($high, $volume, 5), 5)*CSRank(Std($close, 20)))",
    23: "If(Sum($high, 20)/20 < $high, -1*Delta($high, 2), 0)",
    24: (
        "If((Delta(Sum($close, 100)/100, 100)/Ref($close, 100) < 0.05) | (Delta(Sum($close, "
        "100)/100, 100)/Ref($close, 100) == 0.05), -1*($close - Min($close, 100)), "
        "-1*Delta($close, 3))"
    ),
    25: "CSRank(-1*{returns}*{adv20}*$vwap*($high - $close))",
    26: "-1*Max(Corr(Rank($volume, 5), Rank($high, 5), 5), 3)",
    27: "If(0.5 < CSRank(Sum(Corr(CSRank($volume), CSRank($vwap), 6), 2)/2), -1, 1)",
    28: "CSScale(Corr({adv20}, $low, 5) + ($high + $low)/2 - $close)",
    29: (
        "Min(Product(CSRank(CSRank(CSScale(Log(Sum(Min(CSRank(CSRank(-1*CSRank(Delta($close - "
        "1, 5)))), 2), 1))))), 1), 5) + Rank(Ref(-1*{returns}, 6), 5)"
    ),
    30: (
        "(1 - CSRank(Sign($close - Ref($close, 1)) + Sign(Ref($close, 1) - Ref($close, 2)) + "
        "Sign(Ref($close, 2) - Ref($close, 3))))*Sum($volume, 5)/Sum($volume, 20)"
    ),
    31: (
        "CSRank(CSRank(CSRank(DecayLinear(-1*CSRank(CSRank(Delta($close, 10))), 10)))) + "
        "CSRank(-1*Delta($close, 3)) + Sign(CSScale(Corr({adv20}, $low, 12)))"
    ),
    32: "CSScale(Sum($close, 7)/7 - $close) + 20*CSScale(Corr($vwap, Ref($close, 5), 230))",
    33: "CSRank(-1*(1 - $open/$close) ** 1)",
    34: "CSRank(1 - CSRank(Std({returns}, 2)/Std({returns}, 5)) + (1 - CSRank(Delta($close, 1))))",
    35: "Rank($volume, 32)*(1 - Rank($close + $high - $low, 16))*(1 - Rank({returns}, 32))",
    36: (
        "2.21*CSRank(Corr($close - $open, Ref($volume, 1), 15)) + 0.7*CSRank($open - $close) + "
        "0.73*CSRank(Rank(Ref(-1*{returns}, 6), 5)) + CSRank(Abs(Corr($vwap, {adv20}, 6))) + "
        "0.6*CSRank((Sum($close, 200)/200 - $open)*($close - $open))"
    ),
    37: "CSRank(Corr(Ref($open - $close, 1), $close, 200)) + CSRank($open - $close)",
    38: "-1*CSRank(Rank($close, 10))*CSRank($close/$open)",
    39: (
        "-1*CSRank(Delta($close, 7)*(1 - CSRank(DecayLinear($volume/{adv20}, 9))))*(1 + "
        "CSRank(Sum({returns}, 250)))"
    ),
    40: "-1*CSRank(Std($high, 10))*Corr($high, $volume, 10)",
    41: "($high*$low) ** 0.5 - $vwap",
    42: "CSRank($vwap - $close)/CSRank($vwap + $close)",
    43: "Rank($volume/{adv20}, 20)*Rank(-1*Delta($close, 7), 8)",
    44: "-1*Corr($high, CSRank($volume), 5)",
    45: (
        "-1*(CSRank(Sum(Ref($close, 5), 20)/20)*(Sign(Delta($close, 1)*Delta($volume, "
        "1))/Abs(Sign(Delta($close, 1)*Delta($volume, 1))))*CSRank(Sign(Delta(Sum($close, 5), "
        "1)*Delta(Sum($close, 20), 1))/Abs(Sign(Delta(Sum($close, 5), 1)*Delta(Sum($close, 20), "
        "1)))))"
    ),
    46: (
        "If(0.25 < (Ref($close, 20) - Ref($close, 10))/10 - (Ref($close, 10) - $close)/10, -1, "
        "If((Ref($close, 20) - Ref($close, 10))/10 - (Ref($close, 10) - $close)/10 < 0, 1, "
        "-1*($close - Ref($close, 1))))"
    ),
    47: (
        "CSRank(1/$close)*$volume/{adv20}*($high*CSRank($high - $close)/(Sum($high, 5)/5)) - "
        "CSRank($vwap - Ref($vwap, 5))"
    ),
    48: (
        "CSDemean(Corr(Delta($close, 1), Delta(Ref($close, 1), 1), 250)*Delta($close, "
        "1)/$close{subindustry})/Sum((Delta($close, 1)/Ref($close, 1)) ** 2, 250)"
    ),
    49: (
        "If((Ref($close, 20) - Ref($close, 10))/10 - (Ref($close, 10) - $close)/10 < -0.1, 1, "
        "-1*($close - Ref($close, 1)))"
    ),
    50: "-1*Max(CSRank(Corr(CSRank($volume), CSRank($vwap), 5)), 5)",
    51: (
        "If((Ref($close, 20) - Ref($close, 10))/10 - (Ref($close, 10) - $close)/10 < -0.05, 1, "
        "-1*($close - Ref($close, 1)))"
    ),
    52: (
        "(-1*Min($low, 5) + Ref(Min($low, 5), 5))*CSRank((Sum({returns}, 240) - Sum({returns}, "
        "20))/220)*Rank($volume, 5)"
    ),
    53: "-1*Delta(($close - $low - ($high - $close))/($close - $low), 9)",
    54: "-1*(($low - $close)*$open ** 5)/(($low - $high)*$close ** 5)",
    55: (
        "-1*Corr(CSRank(($close - Min($low, 12))/(Max($high, 12) - Min($low, 12))), "
        "CSRank($volume), 6)"
    ),
    56: "0 - 1*(CSRank(Sum({returns}, 10)/Sum(Sum({returns}, 2), 3))*CSRank({returns}*{cap}))",
    57: "0 - 1*(($close - $vwap)/DecayLinear(CSRank(ArgMax($close, 30)), 2))",
    58: "-1*Rank(DecayLinear(Corr(CSDemean($vwap{sector}), $volume, 3), 7), 5)",
    59: (
        "-1*Rank(DecayLinear(Corr(CSDemean($vwap*0.728317 + $vwap*(1 - 0.728317){industry}), "
        "$volume, 4), 16), 8)"
    ),
    60: (
        "0 - 1*(2*CSScale(CSRank(($close - $low - ($high - $close))/($high - $low)*$volume)) - "
        "CSScale(CSRank(ArgMax($close, 10))))"
    ),
    61: "CSRank($vwap - Min($vwap, 16)) < CSRank(Corr($vwap, {adv180}, 17))",
    62: (
        "(CSRank(Corr($vwap, Sum({adv20}, 22), 9)) < CSRank(CSRank($open) + CSRank($open) < "
        "CSRank(($high + $low)/2) + CSRank($high)))*-1"
    ),
    63: (
        "(CSRank(DecayLinear(Delta(CSDemean($close{industry}), 2), 8)) - "
        "CSRank(DecayLinear(Corr($vwap*0.318108 + $open*(1 - 0.318108), Sum({adv180}, 37), 13), "
        "12)))*-1"
    ),
    64: (
        "(CSRank(Corr(Sum($open*0.178404 + $low*(1 - 0.178404), 12), Sum({adv120}, 12), 16)) < "
        "CSRank(Delta(($high + $low)/2*0.178404 + $vwap*(1 - 0.178404), 3)))*-1"
    ),
    65: (
        "(CSRank(Corr($open*0.00817205 + $vwap*(1 - 0.00817205), Sum({adv60}, 8), 6)) < "
        "CSRank($open - Min($open, 13)))*-1"
    ),
    66: (
        "(CSRank(DecayLinear(Delta($vwap, 3), 7)) + Rank(DecayLinear(($low*0.96633 + $low*(1 - "
        "0.96633) - $vwap)/($open - ($high + $low)/2), 11), 6))*-1"
    ),
    67: (
        "CSRank($high - Min($high, 2)) ** CSRank(Corr(CSDemean($vwap{sector}), "
        "CSDemean({adv20}{subindustry}), 6))*-1"
    ),
    68: (
        "(Rank(Corr(CSRank($high), CSRank({adv15}), 8), 13) < CSRank(Delta($close*0.518371 + "
        "$low*(1 - 0.518371), 1)))*-1"
    ),
    69: (
        "CSRank(Max(Delta(CSDemean($vwap{industry}), 2), 4)) ** Rank(Corr($close*0.490655 + "
        "$vwap*(1 - 0.490655), {adv20}, 4), 9)*-1"
    ),
    70: "CSRank(Delta($vwap, 1)) ** Rank(Corr(CSDemean($close{industry}), {adv50}, 17), 17)*-1",
    71: (
        "Greater(Rank(DecayLinear(Corr(Rank($close, 3), Rank({adv180}, 12), 18), 4), 15), "
        "Rank(DecayLinear(CSRank($low + $open - ($vwap + $vwap)) ** 2, 16), 4))"
    ),
    72: (
        "CSRank(DecayLinear(Corr(($high + $low)/2, {adv40}, 8), "
        "10))/CSRank(DecayLinear(Corr(Rank($vwap, 3), Rank($volume, 18), 6), 2))"
    ),
    73: (
        "Greater(CSRank(DecayLinear(Delta($vwap, 4), 2)), Rank(DecayLinear(Delta($open*0.147155 "
        "+ $low*(1 - 0.147155), 2)/($open*0.147155 + $low*(1 - 0.147155))*-1, 3), 16))*-1"
    ),
    74: (
        "(CSRank(Corr($close, Sum({adv30}, 37), 15)) < CSRank(Corr(CSRank($high*0.0261661 + "
        "$vwap*(1 - 0.0261661)), CSRank($volume), 11)))*-1"
    ),
    75: "CSRank(Corr($vwap, $volume, 4)) < CSRank(Corr(CSRank($low), CSRank({adv50}), 12))",
    76: (
        "Greater(CSRank(DecayLinear(Delta($vwap, 1), 11)), "
        "Rank(DecayLinear(Rank(Corr(CSDemean($low{sector}), {adv81}, 8), 19), 17), 19))*-1"
    ),
    77: (
        "Less(CSRank(DecayLinear(($high + $low)/2 + $high - ($vwap + $high), 20)), "
        "CSRank(DecayLinear(Corr(($high + $low)/2, {adv40}, 3), 5)))"
    ),
    78: (
        "CSRank(Corr(Sum($low*0.352233 + $vwap*(1 - 0.352233), 19), Sum({adv40}, 19), 6)) ** "
        "CSRank(Corr(CSRank($vwap), CSRank($volume), 5))"
    ),
    79: (
        "CSRank(Delta(CSDemean($close*0.60733 + $open*(1 - 0.60733){sector}), 1)) < "
        "CSRank(Corr(Rank($vwap, 3), Rank({adv150}, 9), 14))"
    ),
    80: (
        "CSRank(Sign(Delta(CSDemean($open*0.868128 + $high*(1 - 0.868128){industry}), 4))) ** "
        "Rank(Corr($high, {adv10}, 5), 5)*-1"
    ),
    81: (
        "(CSRank(Log(Product(CSRank(CSRank(Corr($vwap, Sum({adv10}, 49), 8)) ** 4), 14))) < "
        "CSRank(Corr(CSRank($vwap), CSRank($volume), 5)))*-1"
    ),
    82: (
        "Less(CSRank(DecayLinear(Delta($open, 1), 14)), "
        "Rank(DecayLinear(Corr(CSDemean($volume{sector}), $open*0.634196 + $open*(1 - "
        "0.634196), 17), 6), 13))*-1"
    ),
    83: (
        "CSRank(Ref(($high - $low)/(Sum($close, 5)/5), 2))*CSRank(CSRank($volume))/(($high - "
        "$low)/(Sum($close, 5)/5)/($vwap - $close))"
    ),
    84: (
        "Sign(Rank($vwap - Max($vwap, 15), 20))*Abs(Rank($vwap - Max($vwap, 15), 20)) ** "
        "Delta($close, 4)"
    ),
    85: (
        "CSRank(Corr($high*0.876703 + $close*(1 - 0.876703), {adv30}, 9)) ** "
        "CSRank(Corr(Rank(($high + $low)/2, 3), Rank($volume, 10), 7))"
    ),
    86: (
        "(Rank(Corr($close, Sum({adv20}, 14), 6), 20) < CSRank($open + $close - ($vwap + "
        "$open)))*-1"
    ),
    87: (
        "Greater(CSRank(DecayLinear(Delta($close*0.369701 + $vwap*(1 - 0.369701), 1), 2)), "
        "Rank(DecayLinear(Abs(Corr(CSDemean({adv81}{industry}), $close, 13)), 4), 14))*-1"
    ),
    88: (
        "Less(CSRank(DecayLinear(CSRank($open) + CSRank($low) - (CSRank($high) + "
        "CSRank($close)), 8)), Rank(DecayLinear(Corr(Rank($close, 8), Rank({adv60}, 20), 8), "
        "6), 2))"
    ),
    89: (
        "Rank(DecayLinear(Corr($low*0.967285 + $low*(1 - 0.967285), {adv10}, 6), 5), 3) - "
        "Rank(DecayLinear(Delta(CSDemean($vwap{industry}), 3), 10), 15)"
    ),
    90: (
        "CSRank($close - Max($close, 4)) ** Rank(Corr(CSDemean({adv40}{subindustry}), $low, 5), "
        "3)*-1"
    ),
    91: (
        "(Rank(DecayLinear(DecayLinear(Corr(CSDemean($close{industry}), $volume, 9), 16), 3), "
        "4) - CSRank(DecayLinear(Corr($vwap, {adv30}, 4), 2)))*-1"
    ),
    92: (
        "Less(Rank(DecayLinear(($high + $low)/2 + $close < $low + $open, 14), 18), "
        "Rank(DecayLinear(Corr(CSRank($low), CSRank({adv30}), 7), 6), 6))"
    ),
    93: (
        "Rank(DecayLinear(Corr(CSDemean($vwap{industry}), {adv81}, 17), 19), "
        "7)/CSRank(DecayLinear(Delta($close*0.524434 + $vwap*(1 - 0.524434), 2), 16))"
    ),
    94: "CSRank($vwap - Min($vwap, 11)) ** Rank(Corr(Rank($vwap, 19), Rank({adv60}, 4), 18), 2)*-1",
    95: (
        "CSRank($open - Min($open, 12)) < Rank(CSRank(Corr(Sum(($high + $low)/2, 19), "
        "Sum({adv40}, 19), 12)) ** 5, 11)"
    ),
    96: (
        "Greater(Rank(DecayLinear(Corr(CSRank($vwap), CSRank($volume), 3), 4), 8), "
        "Rank(DecayLinear(ArgMax(Corr(Rank($close, 7), Rank({adv60}, 4), 3), 12), 14), 13))*-1"
    ),
    97: (
        "(CSRank(DecayLinear(Delta(CSDemean($low*0.721001 + $vwap*(1 - 0.721001){industry}), "
        "3), 20)) - Rank(DecayLinear(Rank(Corr(Rank($low, 7), Rank({adv60}, 17), 4), 18), 15), "
        "6))*-1"
    ),
    98: (
        "CSRank(DecayLinear(Corr($vwap, Sum({adv5}, 26), 4), 7)) - "
        "CSRank(DecayLinear(Rank(ArgMin(Corr(CSRank($open), CSRank({adv15}), 20), 8), 6), 8))"
    ),
    99: (
        "(CSRank(Corr(Sum(($high + $low)/2, 19), Sum({adv60}, 19), 8)) < CSRank(Corr($low, "
        "$volume, 6)))*-1"
    ),
    100: (
        "0 - 1*((1.5*CSScale(CSDemean(CSDemean(CSRank(($close - $low - ($high - $close))/($high "
        "- $low)*$volume){subindustry}){subindustry})) - CSScale(CSDemean(Corr($close, "
        "CSRank({adv20}), 5) - CSRank(ArgMin($close, 30)){subindustry})))*($volume/{adv20}))"
    ),
    101: "($close - $open)/($high - $low + 0.001)",
}


def alpha101(
    *,
    groups: Mapping[str, str] | None = None,
    cap: str | None = None,
    dollar_volume: str = DOLLAR_VOLUME,
) -> Features:
    """Return expressions and names of the 101 alphas, ALPHA001 to ALPHA101.

    `groups` maps the paper's classifications to fields with numeric codes, such as
    `{"industry": "gics_industry"}`. A classification without a field uses the next coarser one,
    or else the next finer one; without any, the whole universe is one group. `cap` and
    `dollar_volume` are expressions; without `cap`, all instruments count as equally large (in
    ALPHA056 alone). All values are known at the close of their date.

    Raises ConfigError for an unknown classification.
    """
    fields = dict(groups or {})
    for name in fields:
        if name not in GROUPS:
            raise ConfigError(unknown_name_message("classification", name, GROUPS))

    def fill(match: re.Match[str]) -> str:
        name, days = match[1], match[2]
        if name == "adv":
            return f"Mean({dollar_volume}, {days})"
        if name == "cap":
            return f"({cap})" if cap else "1"
        if name == "returns":
            return "($close/Ref($close, 1) - 1)"
        field = _find_group(name, fields)
        return f", ${field.lstrip('$')}" if field else ""

    expressions = [_PLACEHOLDER.sub(fill, formula) for formula in FORMULAS.values()]
    return expressions, [f"ALPHA{number:03d}" for number in FORMULAS]


def _find_group(name: str, fields: Mapping[str, str]) -> str | None:
    """Return the field of a classification, or of the nearest one, the coarser first."""
    place = GROUPS.index(name)
    order = [*reversed(GROUPS[: place + 1]), *GROUPS[place + 1 :]]
    return next((fields[g] for g in order if g in fields), None)


class Alpha101DL(AlphaDL):
    """Load the 101 alphas as the group "feature"; `config` adds or replaces groups.

    `groups`, `cap` and `dollar_volume` are those of `alpha101`. If `groups` is None, the fields
    named sector, industry and subindustry are used if the source has them. `vwap` stands for a vwap
    that the bars do not have, as in Alpha158.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        filter_pipe: Sequence[Any] | None = None,
        swap_level: bool = True,
        freq: str | Mapping[str, str] | None = None,
        inst_processors: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        columns: Sequence[str] | None = None,
        groups: Mapping[str, str] | None = None,
        cap: str | None = None,
        dollar_volume: str = DOLLAR_VOLUME,
        vwap: str | None = None,
        source: Any = None,
    ) -> None:
        self._finds_groups = groups is None and FEATURE not in (config or {})
        self._options: dict[str, Any] = {"cap": cap, "dollar_volume": dollar_volume}
        self._columns = columns
        super().__init__(
            select_features(alpha101(groups=groups, **self._options), columns),
            config,
            filter_pipe,
            swap_level,
            freq,
            inst_processors,
            vwap=vwap,
            source=source,
        )

    def view(
        self,
        instruments: Any = None,
        start_time: Any = None,
        end_time: Any = None,
        *,
        source: Source | None = None,
        columns: Names | None = None,
    ) -> View:
        if self._finds_groups:
            self._find_groups(self._resolve_source(source))
        return super().view(instruments, start_time, end_time, source=source, columns=columns)

    def _find_groups(self, source: Source) -> None:
        """Set the expressions for the classifications that the source has as fields."""
        group_fields = source.find_fields(GROUPS, self.freq)
        stored = [g for g in GROUPS if g in group_fields]
        features = alpha101(groups={g: g for g in stored}, **self._options)
        expressions, names = select_features(features, self._columns)
        self._fields[FEATURE] = dict(zip(names, expressions, strict=True))
        if stored:
            log.info("Alpha101 is neutralised by %s", ", ".join(stored))
        else:
            log.info(
                "Alpha101 is neutralised over the whole universe: the source has no field %s",
                ", ".join(GROUPS),
            )


class Alpha101(AlphaHandler):
    """The 101 formulaic alphas of Kakushadze (2016); the label is that of Alpha158.

    The arguments are those of Alpha158, and `groups`, `cap`, `dollar_volume` of `Alpha101DL`.
    Many alphas compare the instruments of a day, which are the members of the universe (after its
    filters) on that day. The longest windows reach back 251 days. Some alphas divide by
    differences of prices, so that `infer_processors` should begin with ProcessInf.
    """

    def __init__(
        self,
        instruments: Any = "all",
        start_time: Any = None,
        end_time: Any = None,
        freq: str | None = None,
        infer_processors: Sequence[Any] = INFER_PROCESSORS_101,
        learn_processors: Sequence[Any] = LEARN_PROCESSORS,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        process_type: str = DataHandlerLP.PTYPE_A,
        filter_pipe: Sequence[Any] | None = None,
        inst_processors: Sequence[Any] | None = None,
        *,
        shared_processors: Sequence[Any] = (),
        label: Any = None,
        columns: Sequence[str] | None = None,
        groups: Mapping[str, str] | None = None,
        cap: str | None = None,
        dollar_volume: str = DOLLAR_VOLUME,
        vwap: str | None = None,
        drop_raw: bool = False,
        allow_wide_fit: bool = False,
        init_data: bool = False,
        fetch_orig: bool = True,
        source: Any = None,
        cache: bool | str | Path = False,
        device: str = "cpu",
    ) -> None:
        loader = Alpha101DL(
            self._loader_config(label),
            filter_pipe,
            freq=freq,
            inst_processors=inst_processors,
            columns=columns,
            groups=groups,
            cap=cap,
            dollar_volume=dollar_volume,
            vwap=vwap,
        )
        super().__init__(
            instruments,
            start_time,
            end_time,
            loader,
            infer_processors,
            learn_processors,
            shared_processors,
            process_type,
            drop_raw,
            fit_start_time=fit_start_time,
            fit_end_time=fit_end_time,
            allow_wide_fit=allow_wide_fit,
            init_data=init_data,
            fetch_orig=fetch_orig,
            source=source,
            cache=cache,
            device=device,
        )
