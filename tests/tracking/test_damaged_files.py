"""A damaged file of an object is refused by name; files of format 1, without a digest, are read."""

from __future__ import annotations

import json
import pickle
import random
import zipfile

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from stored_things import Counter, Plan

from qtorch.core.errors import LoadObjectError
from qtorch.core.file_digest import PLACEHOLDER
from qtorch.core.session import session_context
from qtorch.tracking.artifacts import pickle_body, read_object, write_object
from qtorch.tracking.frames import DIGEST, METADATA, frame_header

SCORES = pd.Series(
    np.arange(40, dtype=np.float32),
    pd.MultiIndex.from_product(
        [pd.date_range("2020-01-01", periods=8), list("ABCDE")], names=["datetime", "instrument"]
    ),
    name="score",
)
# A text that looks like a digest must not be taken for the digest of the file.
VALUES = {
    "parquet": SCORES,
    "parquet with a placeholder": pd.DataFrame({PLACEHOLDER: [PLACEHOLDER, "x"]}),
    "json": {"lr": 0.001, "dates": [pd.Timestamp("2020-01-01")], "text": PLACEHOLDER},
    "safetensors": {"w": np.arange(30.0).reshape(5, 6), PLACEHOLDER: np.eye(2)},
    "json of a state": Plan(("a", 1), None),
    "safetensors of a state": Plan(("a", 1), [1.0, 2.0, 3.0]),
    "zip": [SCORES, {"cash": 1.0, "text": PLACEHOLDER}],
    "pickle": Counter(PLACEHOLDER),
}
NAME = "thing.pkl"


@pytest.fixture(autouse=True)
def _trust():
    with session_context(trusted=("stored_things",)):
        yield


def assert_equal(value, expected) -> None:
    if isinstance(expected, pd.Series):
        pd.testing.assert_series_equal(value, expected, check_freq=False)
    elif isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(value, expected)
    elif isinstance(expected, np.ndarray | torch.Tensor):
        np.testing.assert_array_equal(value, expected)
    elif isinstance(expected, Plan | Counter):
        assert_equal(vars(value), vars(expected))
    elif isinstance(expected, dict):
        assert list(value) == list(expected)
        for key, part in expected.items():
            assert_equal(value[key], part)
    elif isinstance(expected, list):
        assert len(value) == len(expected)
        for part, expected_part in zip(value, expected, strict=True):
            assert_equal(part, expected_part)
    else:
        assert value == expected


def load(path):
    """Load an object, also from a pickle."""
    with session_context(trusted_pickle=True):
        return read_object(path, NAME)


@pytest.mark.parametrize("kind", VALUES)
def test_flipped_bit_anywhere_is_refused(kind, tmp_path):
    path = write_object(VALUES[kind], tmp_path, NAME)
    assert_equal(load(path), VALUES[kind])
    content, rng = path.read_bytes(), random.Random(0)
    positions = {*range(50), *range(-50, 0), *rng.choices(range(len(content)), k=300)}
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(LoadObjectError, match=rf"'thing\.pkl'.*{path.name}"):
            load(path)


@pytest.mark.parametrize("kind", VALUES)
def test_lost_or_overwritten_block_is_refused(kind, tmp_path):
    path = write_object(VALUES[kind], tmp_path, NAME)
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(50):
        start, length = rng.randrange(len(content)), rng.randrange(1, 400)
        end = min(start + length, len(content))
        replacement = rng.choice([b"", bytes(end - start), rng.randbytes(end - start)])
        damaged = content[:start] + replacement + content[end:]
        if damaged == content:
            continue
        path.write_bytes(damaged)
        with pytest.raises(LoadObjectError, match=r"'thing\.pkl'"):
            load(path)


def test_error_tells_what_to_do(tmp_path):
    path = write_object({"lr": 0.1}, tmp_path, "task")
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(LoadObjectError, match=r"damaged or edited .* Restore it from a copy"):
        read_object(path, "task")


def test_damaged_pickle_is_refused_by_a_reader_of_its_bytes(tmp_path):
    path = write_object(Counter(3), tmp_path, NAME)
    path.write_bytes(path.read_bytes().replace(b"count", b"cXunt"))
    with pytest.raises(LoadObjectError, match=r"'thing\.pkl' cannot be read.*do not match"):
        pickle_body(path.read_bytes(), NAME)


def test_other_programs_read_the_files(tmp_path):
    paths = {k: write_object(v, tmp_path, f"{i}.pkl") for i, (k, v) in enumerate(VALUES.items())}
    assert len(pd.read_parquet(paths["parquet"])) == 40
    metadata = pq.read_metadata(paths["parquet"]).metadata
    assert metadata[DIGEST].startswith(b"qtorch-crc32-")
    assert json.loads(paths["json"].read_text())["value"]["lr"] == 0.001
    with safe_open(paths["safetensors"], framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("0"), VALUES["safetensors"]["w"])
    with zipfile.ZipFile(paths["zip"]) as archive:
        assert archive.testzip() is None
        assert "tree.json" in archive.namelist()


def test_files_of_format_1_are_read(tmp_path):
    def head(kind: str, **content) -> str:
        return json.dumps({"qtorch": {"format": 1, "kind": kind}, **content})

    paths = [tmp_path / f"{NAME}.{k}" for k in ("json", "safetensors", "pickle", "zip", "parquet")]
    paths[0].write_text(head("plain", value={"a": 1}))
    text = head("tensors", single=True, arrays=[""], names=[""])
    paths[1].write_bytes(save({"0": torch.eye(2)}, metadata={"qtorch": text}))
    paths[2].write_bytes(b"qtorch pickle 1\n" + pickle.dumps(Counter(3)))
    with zipfile.ZipFile(paths[3], "w") as archive:
        archive.writestr("tree.json", head("tree", tree={"list": [{"file": "0.pkl.json"}]}))
        archive.write(paths[0], "0.pkl.json")
    new_path = write_object(SCORES, tmp_path / "new", NAME)
    table, header = pq.read_table(new_path), {**frame_header(new_path), "format": 1}
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(header)}), paths[4])
    expected_values = ({"a": 1}, np.eye(2), Counter(3), [{"a": 1}], SCORES)
    for path, expected_value in zip(paths, expected_values, strict=True):
        assert_equal(load(path), expected_value)
