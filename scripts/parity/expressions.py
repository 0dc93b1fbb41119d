"""Expressions that use every operator of the expression language, alone and combined."""

from __future__ import annotations

ROLLING = (
    *("Mean", "Sum", "Std", "Var", "Skew", "Kurt", "Max", "Min", "IdxMax", "IdxMin", "Med", "Mad"),
    *("Rank", "Count", "Slope", "Rsquare", "Resi", "WMA", "EMA", "Ref", "Delta"),
)
_MIN_WINDOW = {"Skew": 3, "Kurt": 4}


def operator_expressions(references: tuple[str, str] = ("STR000", "STR001")) -> list[str]:
    """The expressions of the parity table and of the golden file.

    `references` are two instruments of the bars, for the operators that read another instrument.
    """
    expressions = [
        f"{name}(${field}, {window})"
        for name in ROLLING
        for field, windows in (("close", (1, 2, 5, 13, 60, 0)), ("volume", (7, 30)))
        for window in windows
        if window == 0 or window >= _MIN_WINDOW.get(name, 1)
    ]
    expressions += [
        f"Quantile($close, {w}, {q})" for w in (1, 5, 24, 60, 0) for q in (0, 0.2, 0.5, 0.83, 1)
    ]
    expressions += [f"Quantile($volume, 20, {q})" for q in (0.1, 0.9)]
    expressions += [f"EMA($close, {a})" for a in (0.05, 0.5, 0.94)]
    expressions += [f"Corr($close, $volume, {w})" for w in (2, 5, 20, 60)]
    expressions += [f"Cov($close, $open, {w})" for w in (2, 5, 20, 60)]
    expressions += [
        "Ref($close, -1)",
        "Ref($close, -5)",
        "Delta($close, -3)",
        "Ref(Ref($close, 3), -2)",
    ]
    expressions += _elementwise_expressions()
    expressions += _operator_combinations(references)
    return expressions


def _elementwise_expressions() -> list[str]:
    tests = [f"{name}($close, $open)" for name in ("Gt", "Ge", "Lt", "Le", "Eq", "Ne")]
    return [
        *("$close", "Feature('close')", "Abs($close-$open)", "Sign($close-$open)", "Log($volume)"),
        *(
            "Power($close, 2)",
            "$close**0.5",
            "2**($close/$open)",
            "Power($close/$open, $high/$low)",
        ),
        *("Add($close, $open)", "Sub($close, 1.5)", "Mul(2, $close)", "Div($close, $volume)"),
        *("$close+$open", "$close-$open", "3*$close", "1/$volume", "$close/3", "10-$close"),
        *("Greater($close, $open)", "Less($close, $open)", "Greater($close-$open, 0)"),
        *tests,
        *(
            "$close>$open",
            "$close>=20",
            "$close<$open",
            "$close<=20",
            "$close==$open",
            "$close!=$vwap",
        ),
        *("15<$close", "And($close>$open, $volume>100000)", "Or($close>$open, $volume>100000)"),
        *("($close>$open)&($close>20)", "($close>$open)|($close>20)", "Not($close>$open)"),
        *("If($close>$open, $high, $low)", "If($close>$open, 1, $low)", "If($close>$open, 1, 0)"),
        *("If($close-$open, $close, -1)", "Sign($close>$open)", "($close>$open)*$volume"),
        *("($close>$open)*2+1", "($close>$open)/2"),
    ]


def _operator_combinations(references: tuple[str, str]) -> list[str]:
    return [
        "Mean($close, 5)-Mean($close, 10)",
        "EMA($close, 12)/$close-EMA($close, 26)/$close",
        "EMA(EMA($close, 12)-EMA($close, 26), 9)/$close",
        "($close-Mean($close, 20))/(Std($close, 20)+1e-6)",
        "Mean($close>Ref($close, 1), 10)-Mean($close<Ref($close, 1), 10)",
        "Sum(If($close>Ref($close, 1), $volume, 0), 20)/Sum($volume, 20)",
        "Std($close/Ref($close, 1)-1, 20)",
        "Rank(Mean($close, 5), 20)",
        "IdxMax(Mean($close, 3), 15)",
        "IdxMin(Mean($close, 3), 15)",
        "Max(Mean($volume, 3), 15)/Min(Mean($volume, 3), 15)",
        "Quantile(Mean($close, 3), 15, 0.7)",
        "Med(Delta($close, 2), 9)",
        "Slope(Log($close), 20)",
        "Rsquare(Log($volume+1), 20)",
        "Resi(Mean($close, 3), 12)",
        "Corr(Mean($close, 3), Mean($volume, 3), 20)",
        "Corr($close/Ref($close, 1), $volume/Ref($volume, 1), 20)",
        "Cov($close/Ref($close, 1), Log($volume+1), 20)",
        "Mean($volume/Ref($volume, 1), 10)",
        "Max($volume/Ref($volume, 1), 10)",
        "Count($close>$open, 10)",
        "Std($close>$open, 10)",
        "Max($close>$open, 3)",
        "IdxMax($close>$open, 7)",
        "Rank($close>$open, 7)",
        "WMA($close>$open, 7)",
        "Mad($close/Ref($close, 1), 11)",
        "Skew($close/Ref($close, 1), 20)",
        "Kurt($close/Ref($close, 1), 20)",
        "Kurt($volume, 60)/Skew($volume, 60)",
        "Ref(Mean($close, 5), -3)/$close",
        "Ref(Std($close, 5), 4)",
        "Delta(Mean($close, 5), 5)",
        "Sum($close, 5)/5-$close",
        "Log(Mean($volume, 5))",
        "Power(Mean($close, 5)/$close, 2)-1",
        "Var($close, 5)*Var($volume, 5)",
        f"Mask($close, '{references[0]}')",
        f"$close/Mask($close, '{references[1]}')",
        f"Mean(Mask($close, '{references[1].lower()}'), 5)/$close",
        f"ChangeInstrument('{references[0]}', Mean($close, 5))",
    ]
