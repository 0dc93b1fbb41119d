"""Qlib's expression language: parsing, planning, and evaluation for all instruments at once."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.data.expression.evaluation import evaluate as evaluate
    from qtorch.data.expression.operators import get_operators as get_operators
    from qtorch.data.expression.operators import register_operator as register_operator
    from qtorch.data.expression.operators import unregister_operator as unregister_operator
    from qtorch.data.expression.parser import parse as parse
    from qtorch.data.expression.requirement import expression_fields as expression_fields
    from qtorch.data.expression.requirement import reach as reach

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "evaluate": "qtorch.data.expression.evaluation",
        "expression_fields": "qtorch.data.expression.requirement",
        "get_operators": "qtorch.data.expression.operators",
        "parse": "qtorch.data.expression.parser",
        "reach": "qtorch.data.expression.requirement",
        "register_operator": "qtorch.data.expression.operators",
        "unregister_operator": "qtorch.data.expression.operators",
    },
)
