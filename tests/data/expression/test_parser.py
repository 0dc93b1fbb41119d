"""Parsing of expressions: canonical forms, precedence, error positions, reach and fields."""

from __future__ import annotations

import ast
import random

import pytest

from qtorch.core.errors import ConfigError, ExpressionError
from qtorch.data.expression import (
    expression_fields,
    parse,
    reach,
    register_operator,
    unregister_operator,
)
from qtorch.data.expression.parser import Call, Field


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
def test_text_is_parsed_into_its_canonical_form(text, canonical):
    if canonical is None:
        with pytest.raises(ExpressionError, match="bind tighter"):
            parse(text)
    else:
        assert str(parse(text)) == canonical


def test_operator_precedence_equals_python():
    """Random arithmetic parses into the tree that Python's own parser builds."""
    names = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Div: "Div", ast.Pow: "Power"}

    def python_tree(node):
        if isinstance(node, ast.BinOp):
            return f"{names[type(node.op)]}({python_tree(node.left)},{python_tree(node.right)})"
        if isinstance(node, ast.UnaryOp):
            return f"Mul({python_tree(node.operand)},-1)"
        return f"${node.id}"

    rng = random.Random(0)

    def generate(depth):
        if depth == 0 or rng.random() < 0.2:
            return rng.choice("abc")
        kind = rng.random()
        if kind < 0.15:
            return f"-{generate(depth - 1)}"
        inner = (
            f"{generate(depth - 1)}{rng.choice(['+', '-', '*', '/', '**'])}{generate(depth - 1)}"
        )
        return f"({inner})" if kind < 0.5 else inner

    for _ in range(300):
        text = generate(4)
        root = parse("".join(f"${c}" if c.isalpha() else c for c in text))
        assert str(root) == python_tree(ast.parse(text, mode="eval").body), text


def test_nodes_are_hashable_and_have_spans():
    first, second = parse("$close + Mean($close, 5)"), parse("$close+Mean($close,5)")
    assert first == second
    assert hash(first) == hash(second)
    assert isinstance(first, Call)
    assert isinstance(first.arguments[0], Field)
    span = first.arguments[1].span
    assert span.text[span.start : span.end] == "Mean($close, 5)"


@pytest.mark.parametrize(
    ("text", "message", "underlined"),
    [
        ("Maen($close, 5)", "Did you mean 'Mean'", "Maen"),
        ("Mean($close)", "Mean takes 2 arguments (series, window), got 1", "Mean($close)"),
        ("Abs($a, 1)", "Abs takes 1 argument", "Abs($a, 1)"),
        ("Mean($close, 5", "never closed", "("),
        ("Mean($close, $open)", "expected a number for the window", "$open"),
        ("Mean($close, 2.5)", "integer number of rows", "2.5"),
        ("Mean($close, -1)", "integer number of rows", "-1"),
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
        ("1 + 2", "has no field", "1 + 2"),
        ("1/0*$a", "cannot be computed", "1/0"),
        ("Mask($a, SH600000)", "unexpected name 'SH600000'", "SH600000"),
        ("Mask($a, 3)", "expected a quoted name", "3"),
        ("__import__('os')", "unknown operator '__import__'", "__import__"),
        ("$a.real", "unexpected character '.'", "."),
    ],
)
def test_errors_underline_the_position(text, message, underlined):
    with pytest.raises(ExpressionError) as error_info:
        parse(text)
    lines = str(error_info.value).splitlines()
    assert message in lines[0]
    assert lines[1].strip() == text
    if underlined is not None:
        start = lines[2].index("^")
        assert lines[1][start : start + lines[2].count("^")] == underlined


def test_errors_of_long_nested_and_empty_texts():
    with pytest.raises(ExpressionError, match="nested deeper"):
        parse("(" * 3_000 + "$a" + ")" * 3_000)
    with pytest.raises(ExpressionError, match="nested operators"):
        parse("+".join(["$a"] * 5_100))
    with pytest.raises(ExpressionError, match="nested Mask"):
        parse("($b+Mask(" * 21 + "$a" + ", 'x'))" * 21)
    with pytest.raises(ExpressionError) as error_info:
        parse("$a+" * 80 + "Maen($b, 3)" + "+$c" * 80)
    lines = str(error_info.value).splitlines()
    assert len(lines[1]) < 180
    start = lines[2].index("^")
    assert lines[1][start : start + 4] == "Maen"
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
def test_reach_in_rows_before_and_after(text, expected):
    assert reach(text) == expected


def test_expression_fields():
    assert expression_fields("$close/Ref($open, 1)+$close") == ("close", "open")
    assert expression_fields({"A": "$b", "B": "$a+Feature('c')"}) == ("b", "a", "c")


def test_registering_operators():
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
