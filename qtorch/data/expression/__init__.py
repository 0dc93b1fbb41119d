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

__getattr__, __dir__ = lazy_names(__name__, __file__)
