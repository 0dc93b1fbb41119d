"""Frames that come from elsewhere become indexed by (datetime, instrument)."""

from __future__ import annotations

import pandas as pd

from qtorch.data.panel.frames import index_frame


def test_level_without_a_name_beside_a_named_one_is_the_other():
    index = pd.MultiIndex.from_product([pd.bdate_range("2020-01-01", periods=2), ["A", "B"]])
    for names in (["datetime", None], [None, "instrument"]):
        frame = pd.DataFrame({"weight": 1.0}, index=index.set_names(names))
        assert list(index_frame(frame).index.names) == ["datetime", "instrument"]
