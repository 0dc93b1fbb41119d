from __future__ import annotations

import pytest

from qtorch.core.errors import ConfigError
from qtorch.data.processor import DropCol, FilterCol, HashStockFormat


def test_filter_keeps_the_data_order_and_other_groups(view, watch_view) -> None:
    check = watch_view(view)
    col_list = ["z", "x"]
    result = FilterCol(fields_group="feature", col_list=col_list)(view)
    assert result.group("feature").names == ("x", "z")
    assert result.group("label").names == ("LABEL0",)
    assert col_list == ["z", "x"]
    check()


def test_filter_raises_for_an_unknown_column(view) -> None:
    with pytest.raises(ConfigError, match="FilterCol: unknown column 'LABEL'"):
        FilterCol(col_list=["x", "LABEL"])(view)


def test_drop_removes_columns_from_every_group(view) -> None:
    result = DropCol(col_list=["y", "LABEL0", "other"])(view)
    assert result.group("feature").names == ("x", "z")
    assert result.group("label").names == ()


def test_hash_stock_format_returns_the_view(view) -> None:
    assert HashStockFormat()(view) is view
