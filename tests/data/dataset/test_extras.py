from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qtorch import init
from qtorch.core.errors import ConfigError, DataError, TrustError
from qtorch.data import ConceptMatrix, Concepts
from qtorch.data.dataset.extras import BoundConcepts, check_extras

CALENDAR = pd.date_range("2020-01-01", periods=5, name="datetime")
NAMES = pd.Index(["A", "B", "C"], name="instrument")
TABLE = pd.DataFrame(
    [
        ("A", "tech", None, "2020-01-02"),
        ("A", "bank", "2020-01-03", None),
        ("A", "tech", "2020-01-05", None),
        ("B", "bank", None, None),
        ("Z", "mine", None, None),
    ],
    columns=["instrument", "concept", "start", "end"],
)


def by_day(concepts: Concepts, instrument: int) -> list[list[float]]:
    bound_concepts = concepts.bind(CALENDAR, NAMES)
    date = torch.arange(5)
    return bound_concepts.gather(date, torch.full((5,), instrument)).tolist()


def test_memberships_are_as_of_the_date() -> None:
    # Columns: bank, mine, tech.
    assert by_day(Concepts(TABLE), 0) == [[0, 0, 1], [0, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert by_day(Concepts(TABLE), 1) == [[1, 0, 0]] * 5
    assert by_day(Concepts(TABLE), 2) == [[0, 0, 0]] * 5


def test_a_table_without_dates_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "concepts.csv"
    TABLE[["instrument", "concept"]].to_csv(path, index=False)
    assert by_day(Concepts(str(path)), 0) == [[1, 0, 1]] * 5


def test_invalid_tables_and_names_are_refused() -> None:
    with pytest.raises(DataError, match=r"\['concept'\] are missing"):
        Concepts(TABLE.drop(columns="concept")).bind(CALENDAR, NAMES)
    with pytest.raises(DataError, match="no concept table file"):
        Concepts("nowhere.csv").bind(CALENDAR, NAMES)
    with pytest.raises(DataError, match="has no instrument"):
        Concepts(TABLE.assign(instrument=None)).bind(CALENDAR, NAMES)
    with pytest.raises(ConfigError, match="raw_label"):
        check_extras({"raw_label": None})


def test_the_concepts_of_qlibs_files_are_a_matrix_by_instrument(tmp_path):
    np.save(tmp_path / "concepts.npy", np.eye(4)[:, :3])
    np.save(tmp_path / "rows.npy", np.array({"B": 1, "A": 0, "C": np.nan}, dtype=object))
    pd.DataFrame({"instrument": ["B", "A"], "row": [1, 0]}).to_csv(tmp_path / "rows.csv")
    calendar, instruments = pd.bdate_range("2020-01-01", periods=2), pd.Index(["A", "B", "C"])
    matrix = ConceptMatrix(tmp_path / "concepts.npy", tmp_path / "rows.csv")
    bound = matrix.bind(calendar, instruments)
    assert bound.width == 3
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0]])  # the last row is for C
    assert torch.equal(bound.gather(torch.zeros(3).long(), torch.arange(3)), expected)
    pickled = ConceptMatrix(tmp_path / "concepts.npy", tmp_path / "rows.npy")
    with pytest.raises(TrustError, match="trusted_pickle"):
        pickled.bind(calendar, instruments)
    init(trusted_pickle=True)
    same = pickled.bind(calendar, instruments)
    assert torch.equal(same.gather(torch.zeros(3).long(), torch.arange(3)), expected)
    with pytest.raises(DataError, match="no file"):
        ConceptMatrix("nowhere.npy", "rows.csv").bind(calendar, instruments)


def test_an_empty_span_holds_no_date() -> None:
    spans = torch.tensor([[2, 2], [0, 1]])
    concepts = BoundConcepts(("a", "b"), 2, torch.tensor([0, 0]), torch.tensor([0, 1]), spans)
    dates, instruments = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    assert concepts.gather(dates, instruments).tolist() == [[0, 1], [0, 0], [0, 0], [0, 0]]
    assert not concepts.gather(dates, instruments + 1).any()
