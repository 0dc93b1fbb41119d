"""Qlib's expression language: parsed, planned, and evaluated for all instruments at once."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.data.expression.evaluation import evaluate as evaluate
    from qtorch.data.expression.operators import known_operators as known_operators
    from qtorch.data.expression.operators import register_operator as register_operator
    from qtorch.data.expression.operators import unregister_operator as unregister_operator
    from qtorch.data.expression.parser import parse as parse
    from qtorch.data.expression.requirement import fields_of as fields_of
    from qtorch.data.expression.requirement import reach as reach

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "evaluate": "qtorch.data.expression.evaluation",
        "fields_of": "qtorch.data.expression.requirement",
        "known_operators": "qtorch.data.expression.operators",
        "parse": "qtorch.data.expression.parser",
        "reach": "qtorch.data.expression.requirement",
        "register_operator": "qtorch.data.expression.operators",
        "unregister_operator": "qtorch.data.expression.operators",
    },
)
