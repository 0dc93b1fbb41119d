from __future__ import annotations

import ast
import random

import pytest

from qtorch.core.errors import ConfigError, ExpressionError
from qtorch.data.expression import fields_of, parse, reach, register_operator, unregister_operator
from qtorch.data.expression.node import Call, Field


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("$close", "$close"),
        ("Mean($close, 5)/$close-1", "Sub(Div(Mean($close,5),$close),1)"),
        ("-$close**2", "Mul(Power($close,2),-1)"),
        ("2**-$close", "Power(2,Mul($close,-1))"),
        ("$a-$b-$c", "Sub(Sub($a,$b),$c)"),
        ("$a**$b**$c", "Power($a,Power($b,$c))"),
        ("$a|$b>1", None),
        ("($a>1)|($b<2)&~($c==3)", "Or(Gt($a,1),And(Lt($b,2),Not(Eq($c,3))))"),
        ("Feature('close')", "$close"),
        ("Ref( $close ,\n -2 )", "Ref($close,-2)"),
        ("Mean($close, 2*5)", "Mean($close,10)"),
        ("ChangeInstrument('SH1', $close)", "Mask($close,'SH1')"),
        ("$收盘（后）", "$收盘（后）"),
        ("1e-12+$volume", "Add(1e-12,$volume)"),
    ],
)
def test_canonical_form(text, canonical):
    if canonical is None:
        with pytest.raises(ExpressionError, match="bind tighter"):
            parse(text)
    else:
        assert str(parse(text)) == canonical


def test_precedence_is_pythons():
    """Random arithmetic parses into the tree that Python's own parser builds."""
    names = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Div: "Div", ast.Pow: "Power"}

    def of_python(node):
        if isinstance(node, ast.BinOp):
            return f"{names[type(node.op)]}({of_python(node.left)},{of_python(node.right)})"
        if isinstance(node, ast.UnaryOp):
            return f"Mul({of_python(node.operand)},-1)"
        return f"${node.id}"

    rng = random.Random(0)

    def grow(depth):
        if depth == 0 or rng.random() < 0.2:
            return rng.choice("abc")
        kind = rng.random()
        if kind < 0.15:
            return f"-{grow(depth - 1)}"
        inner = f"{grow(depth - 1)}{rng.choice(['+', '-', '*', '/', '**'])}{grow(depth - 1)}"
        return f"({inner})" if kind < 0.5 else inner

    for _ in range(300):
        text = grow(4)
        ours = parse("".join(f"${c}" if c.isalpha() else c for c in text))
        assert str(ours) == of_python(ast.parse(text, mode="eval").body), text


def test_nodes_are_hashable_and_know_their_place():
    left, right = parse("$close + Mean($close, 5)"), parse("$close+Mean($close,5)")
    assert left == right
    assert hash(left) == hash(right)
    assert isinstance(left, Call)
    assert isinstance(left.arguments[0], Field)
    span = left.arguments[1].span
    assert span.text[span.start : span.end] == "Mean($close, 5)"


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("Maen($close, 5)", "Did you mean 'Mean'", "Maen"),
        ("Mean($close)", "Mean takes 2 arguments (series, window), got 1", "Mean($close)"),
        ("Abs($a, 1)", "Abs takes 1 argument", "Abs($a, 1)"),
        ("Mean($close, 5", "never closed", "("),
        ("Mean($close, $open)", "expected a plain number for the window", "$open"),
        ("Mean($close, 2.5)", "whole number", "2.5"),
        ("Mean($close, -1)", "whole number", "-1"),
        ("EMA($close, 1.5)", "alpha in (0, 1)", "1.5"),
        ("Skew($close, 2)", "at least 3", "2"),
        ("Quantile($close, 5, 1.2)", "from 0 to 1", "1.2"),
        ("Mean(3, 5)", "got a constant", "3"),
        ("And($a, $b>1)", "expected a condition, got numbers", "$a"),
        ("($a>$b)+($c>$d)", "write a | b", None),
        ("1 < $a < 2", "cannot be chained", "<"),
        ("$a = 1", "to compare, write ==", "="),
        ("$a % 2", "no remainder", "%"),
        ("$$roe_q", "point-in-time fields ($$) are not supported", "$$roe_q"),
        ("P($a)", "point-in-time data is not supported", "P"),
        ("close", "a field needs $", "close"),
        ("$a and $b", "unexpected 'and'", "and"),
        ("$a $b", "unexpected '$b'", "$b"),
        ("$a +", "the expression ends", None),
        ("1 + 2", "names no field", "1 + 2"),
        ("1/0*$a", "cannot be computed", "1/0"),
        ("Mask($a, SH600000)", "unexpected name 'SH600000'", "SH600000"),
        ("Mask($a, 3)", "expected a quoted name", "3"),
        ("__import__('os')", "unknown operator '__import__'", "__import__"),
        ("$a.real", "unexpected character '.'", "."),
    ],
)
def test_errors_show_the_place(text, message, marked):
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    shown = str(caught.value).splitlines()
    assert message in shown[0]
    assert shown[1].strip() == text
    if marked is not None:
        begin = shown[2].index("^")
        assert shown[1][begin : begin + shown[2].count("^")] == marked


def test_errors_of_long_and_deep_texts():
    with pytest.raises(ExpressionError, match="nested deeper"):
        parse("(" * 500 + "$a" + ")" * 500)
    with pytest.raises(ExpressionError, match="inside each other"):
        parse("+".join(["$a"] * 1000))
    with pytest.raises(ExpressionError) as caught:
        parse("$a+" * 80 + "Maen($b, 3)" + "+$c" * 80)
    shown = str(caught.value).splitlines()
    assert len(shown[1]) < 180
    begin = shown[2].index("^")
    assert shown[1][begin : begin + 4] == "Maen"
    with pytest.raises(ExpressionError, match="empty"):
        parse("  ")
    with pytest.raises(ExpressionError, match="string"):
        parse(None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$close", (0, 0)),
        ("Ref($close, -2)/Ref($close, -1) - 1", (0, 2)),
        ("Mean($close, 5)", (4, 0)),
        ("Mean(Ref($close, 3), 5)", (7, 0)),
        ("Ref(Mean($close, 5), -2)", (2, 2)),
        ("Ref(Ref($close, -1), 1)", (0, 0)),
        ("Delta($close, 3)", (3, 0)),
        ("Delta($close, -3)", (0, 3)),
        ("EMA($close, 5)", (None, 0)),
        ("Mean($close, 0)", (None, 0)),
        ("Ref($close, 0)", (None, 0)),
        ("Corr($close, Ref($volume, 1), 10)", (10, 0)),
        ("Quantile($close, 10, 0.5)", (9, 0)),
        ("If($a > Ref($a, -4), $b, 1)", (0, 4)),
    ],
)
def test_reach(text, expected):
    assert reach(text) == expected


def test_fields_of():
    assert fields_of("$close/Ref($open, 1)+$close") == ("close", "open")
    assert fields_of({"A": "$b", "B": "$a+Feature('c')"}) == ("b", "a", "c")


def test_registering():
    register_operator("Halve", lambda x: x / 2, arguments=("series",))
    try:
        assert str(parse("Halve($close)")) == "Halve($close)"
        assert reach("Halve(Mean($close, 3))") == (2, 0)
        with pytest.raises(ConfigError, match="replace=True"):
            register_operator("Halve", lambda x: x)
    finally:
        unregister_operator("Halve")
    with pytest.raises(ExpressionError, match="unknown operator 'Halve'"):
        parse("Halve($close)")
    with pytest.raises(ConfigError, match="exists already"):
        register_operator("Mean", lambda x: x, replace=True)
    with pytest.raises(ConfigError, match="cannot name"):
        register_operator("a b", lambda x: x)
    with pytest.raises(ConfigError, match="expected kinds"):
        register_operator("New", lambda x: x, arguments=("window",))
