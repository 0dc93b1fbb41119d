from __future__ import annotations

import pytest

from qtorch.core.errors import ConfigError
from qtorch.data.processor import DropCol, FilterCol, HashStockFormat


def test_filter_keeps_the_data_order_and_other_groups(view, unchanged) -> None:
    check = unchanged(view)
    wanted = ["z", "x"]
    result = FilterCol(fields_group="feature", col_list=wanted)(view)
    assert result.group("feature").names == ("x", "z")
    assert result.group("label").names == ("LABEL0",)
    assert wanted == ["z", "x"]
    check()


def test_filter_refuses_a_name_that_is_not_there(view) -> None:
    with pytest.raises(ConfigError, match="FilterCol: unknown column 'LABEL'"):
        FilterCol(col_list=["x", "LABEL"])(view)


def test_drop_takes_names_in_every_group(view) -> None:
    result = DropCol(col_list=["y", "LABEL0", "nothing"])(view)
    assert result.group("feature").names == ("x", "z")
    assert result.group("label").names == ()


def test_the_storage_format_changes_nothing(view) -> None:
    assert HashStockFormat()(view) is view
