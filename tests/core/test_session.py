from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from qtorch.core.errors import ConfigError, nearest, unknown_name
from qtorch.core.files import remove_unfinished, whole_file
from qtorch.core.runtime import progress, resolve_device, seed_everything
from qtorch.core.session import init, session, session_context


def test_init_sets_only_what_it_is_given():
    init("~/bars", region="cn", seed=3)
    init(tracking_uri="sqlite:///x.db")
    assert session().provider_uri.endswith("/bars")
    assert "~" not in session().provider_uri
    assert (session().region, session().seed) == ("cn", 3)
    assert session().tracking_uri == "sqlite:///x.db"
    with pytest.raises(ConfigError, match=r"unknown region 'uk'\. Known: cn, us"):
        init(region="uk")


def test_a_context_overrides_here_and_not_in_other_threads():
    init(seed=1)
    seen = []
    with session_context(seed=2, trusted=("a",)):
        thread = threading.Thread(target=lambda: seen.append(session().seed))
        thread.start()
        thread.join()
        assert session().seed == 2
    assert seen == [1]
    assert session().seed == 1
    with pytest.raises(ConfigError, match="Did you mean 'seed'"), session_context(sead=1):
        pass


def test_names():
    assert nearest("LSMT", ["LSTM", "GRU"]) == "LSTM"
    assert nearest("lstm", ["LSTM", "GRU"]) == "LSTM"
    assert nearest("zebra", ["LSTM"]) is None
    assert "Known: none" in unknown_name("field", "x", [])
    assert "(20 in all)" in unknown_name("field", "x", [f"f{k}" for k in range(20)])


def test_seeds_and_devices():
    seed_everything(5)
    one = torch.rand(3)
    seed_everything(5)
    assert torch.equal(one, torch.rand(3))
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="is no device"):
        resolve_device("gpu!")
    with pytest.raises(ConfigError, match="CUDA devices"):
        resolve_device("cuda:99")


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a" / "x.txt"
    with whole_file(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("tw")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_what_a_killed_writer_leaves_is_removed_and_a_living_ones_stays(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("whole")
    (tmp_path / ".other.txt").write_text("")
    pid = os.fork()
    if not pid:
        with whole_file(path) as temporary:
            temporary.write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    left = set(tmp_path.iterdir())
    assert len(left) == 3
    with whole_file(path) as temporary:
        temporary.write_text("one")
        remove_unfinished(tmp_path)
        assert set(tmp_path.iterdir()) == {path, tmp_path / ".other.txt", temporary}
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.txt", "x.txt"]
    assert path.read_text() == "one"


def test_progress_gives_every_item():
    assert list(progress(range(5), "counting")) == list(range(5))
