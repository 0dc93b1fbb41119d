"""Rows that another program, an attacker or a bug has written: each fails alone, with a reason."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtorch.cli.main import main
from qtorch.cli.tables.tasks import worker_table
from qtorch.core.errors import TaskDefinitionError, TaskResultError, TaskStoreError
from qtorch.core.terminal import Terminal
from qtorch.task import TaskManager, run_task
from qtorch.task.definition import encode_definition, encode_result
from qtorch.task.worker import SlotStatus

pytestmark = pytest.mark.slow

GOOD = '{"number": 1}'
NO_JSON = {
    "deep list": "[" * 100_000,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep enough": '{"a":' * 200 + "1" + "}" * 200,
    "cut off": '{"model": ',
    "huge int": '{"seed": 1' + "0" * 5000 + "}",
    "duplicate key": '{"model": 1, "model": 2}',
    "nothing": "",
    "control character": '{"a": "\x07"}',
}
NO_OBJECT = {"list": "[1]", "number": "1", "null": "null", "text": '"model"'}
NOT_FINITE = {"infinite": '{"seed": 1e999}', "nan": '{"seed": [NaN]}', "inf": '{"a": -Infinity}'}
WRONG_TYPES = {"bytes": b"\xff\xfe", "int": 7, "float": 0.5, "surrogate": b'{"a": "\xed\xa0\x80"'}
COUNTS = {"text": "abc", "bytes": b"1", "half": 1.5, "infinite": float("inf")}
ODD_MAPPINGS = {
    "odd": json.dumps({"stage": [1], "epoch": {}, "batches": "x", "batch": None, "metrics": {
        "valid/a": "x", "valid/b": 10**400, "c": [1]}, "samples_per_second": "fast", "host": {},
        "recorder_id": 5, "processor": {"a": "\x1b[2J"}}),
    "no metrics": json.dumps({"metrics": [1, 2], "stage": "\ud800"}),
}  # fmt: skip
JSON_FAULTS = {**NO_JSON, **NO_OBJECT, **WRONG_TYPES}
# Per column, the invalid values by a name.
FAULTS = {
    "definition": {**JSON_FAULTS, **NOT_FINITE},
    "res": {
        **NO_JSON,
        "bytes": b"\xff\xfe",
        "no run": '{"$recorder": 5}',
        "no id": '{"$recorder": {}}',
    },
    "run": JSON_FAULTS,
    "priority": {**COUNTS},
    "errors": {**COUNTS},
    "lost": {**COUNTS},
    "preemptions": COUNTS,
    "created": {"text": "yesterday", "bytes": b"1", "infinite": float("inf")},
    "error": {"bytes": b"\xff"},
    "traceback": {"bytes": b"\xff"},
}
CASES = [(column, name) for column, faults in FAULTS.items() for name in faults]
# Invalid values that a claim replaces, or that say what a valid task is.
HARMLESS = {
    "attempt": {"text": "abc", "infinite": float("inf"), "largest": 2**63 - 1},
    "updated": FAULTS["created"],
    "deadline": FAULTS["created"],
    "worker": JSON_FAULTS | ODD_MAPPINGS,
    "progress": JSON_FAULTS | ODD_MAPPINGS,
    "run": ODD_MAPPINGS,
    "origin": {"unknown": "wating", "bytes": b"\xff"},
    "claim": {"bytes": b"\xff"},
    "committed": {"text": "abc"},
    "tokens": {"bytes": b"\xff", "int": 1},
    "hash": {"bytes": b"\xff"},
    "error": {"escape": "\x1b]0;title\x07 \x1b[31m [red]\r"},
    "priority": {"negative": -5, "least": -(2**63), "largest": 2**63 - 1},
    "errors": {"largest": 2**63 - 1},
    "definition": {
        "odd parts": '{"number": 1, "model": {"kwargs": [1], "class": {}}, "seed": {"a": []}, '
        '"tracking": 5}',
        "odd texts": '{"number": 1, "model": {"_target_": "\\ud800 \\u0000 \\u001b[2J [/]"}}',
        "large": '{"number": 1, "seed": 1' + "0" * 400 + "}",
    },
}


def get_number(definition, run=None):
    return definition["number"]


def write(manager, id, **columns):
    """Write columns of a task's row, past the checks of qtorch."""
    store = manager._pool._store()
    if manager.url.startswith("mongo"):
        from bson import ObjectId

        store._tasks.update_one({"_id": ObjectId(id)}, {"$set": columns})
        return
    sets = ", ".join(f"{name} = :{name}" for name in columns)
    store._update(f"UPDATE qtorch_tasks SET {sets} WHERE id = :id", {**columns, "id": int(id)})


def is_refused(manager, id, **columns):
    """Write columns; return whether the database itself refuses such a value."""
    try:
        write(manager, id, **columns)
    except TaskStoreError:
        return True
    return False


def run_commands(manager, capsys):
    """Run the commands that read tasks; return their output."""
    words = [f"pool={manager.task_pool}", f"url={manager.url}"]
    texts = []
    for command in (["list"], ["stat"], ["stat", "model=x"], ["show", "status=failed"], ["export"]):
        with contextlib.suppress(TaskStoreError):
            assert main(["tasks", *command, *words]) in (0, command[0] == "show")
        out, err = capsys.readouterr()
        assert "Error" not in err.replace("TaskDefinitionError", "")
        assert "\x1b" not in out + err
        texts.append(out)
    return "\n".join(texts)


class TestEachFault:
    @pytest.mark.parametrize(("column", "name"), CASES)
    def test_task_fails_with_the_reason_and_others_go_on(self, manager, column, name, capsys):
        ids = manager.create_task([{"number": k} for k in range(3)])
        is_converted = name == "half" or column in ("error", "traceback")
        if is_converted and manager.url.startswith("postgres"):
            pytest.skip("PostgreSQL converts such a value to the type of the column")
        if is_refused(manager, ids[1], **{column: FAULTS[column][name]}):
            pytest.skip("the database refuses such a value")
        run_commands(manager, capsys)
        run_task(get_number, manager.task_pool, url=manager.url)
        tasks = sorted(manager.query(decode=False), key=lambda t: ids.index(t["_id"]))
        assert [t["status"] for t in tasks] == ["done", "failed", "done"]
        assert f"the stored {column} is invalid: it" in tasks[1]["error"]
        assert "replace or remove the task" in tasks[1]["error"]
        assert f"stored {column}" in run_commands(manager, capsys).replace("\n", " ")
        words = [f"pool={manager.task_pool}", f"url={manager.url}"]
        assert main(["tasks", "wait", *words, "timeout=5"]) == 1
        assert main(["tasks", "retry", *words]) == 0
        status = "part_done" if column == "res" else "waiting"
        assert manager.task_stat() == {"done": 2, status: 1}
        assert main(["tasks", "remove", "id=" + ids[1], *words]) == 0
        assert manager.task_stat() == {"done": 2}

    @pytest.mark.parametrize("column", HARMLESS)
    def test_value_that_a_claim_replaces_harms_nothing(self, manager, column, capsys):
        names = list(HARMLESS[column])
        ids = manager.create_task([{"number": k} for k in range(len(names) + 1)])
        for id, name in zip(ids, names, strict=False):
            with contextlib.suppress(TaskStoreError):
                write(manager, id, **{column: HARMLESS[column][name]})
        run_commands(manager, capsys)
        run_task(get_number, manager.task_pool, url=manager.url)
        statuses = [t["status"] for t in manager.query(decode=False)]
        assert statuses[-1] == "done"
        assert set(statuses) == {"done"}, [t["error"] for t in manager.query(decode=False)]
        run_commands(manager, capsys)

    @pytest.mark.parametrize("status", ["wating", "", "DONE", b"\xff", 5])
    def test_unknown_status_counts_as_failed(self, manager, status, capsys):
        first, second = manager.create_task([{"number": k} for k in range(2)])
        if is_refused(manager, first, status=status):
            pytest.skip("the database refuses such a value")
        run_task(get_number, manager.task_pool, url=manager.url)
        assert manager.task_stat() == {"failed": 1, "done": 1}
        assert [t["_id"] for t in manager.query({"status": "failed"})] == [first]
        assert [t["_id"] for t in manager.query({"status": "done"})] == [second]
        failed_tasks = manager.wait(timeout=5).failed_tasks
        assert "the stored status is invalid: unknown task status" in failed_tasks[0]["error"]
        assert "unknown task status" in run_commands(manager, capsys)
        assert manager.reset_status({"status": "failed"}, "waiting") == 1
        run_task(get_number, manager.task_pool, url=manager.url)
        assert manager.task_stat() == {"done": 2}

    @pytest.mark.parametrize("deadline", [None, "never", 1e300, float("inf"), b"\xff", -1e300])
    def test_running_task_without_a_valid_deadline_does_not_run_forever(self, manager, deadline):
        (id,) = manager.create_task([{"number": 1}])
        manager.fetch_task()
        if is_refused(manager, id, deadline=deadline):
            pytest.skip("the database refuses such a value")
        run_task(get_number, manager.task_pool, url=manager.url)
        task = manager.re_query(id)
        if deadline in (None, 1e300, -1e300):
            assert (task["status"], task["lost"]) == ("done", 1)
        else:
            assert task["status"] == "failed"
            assert "the stored deadline is invalid" in task["error"]

    @pytest.mark.parametrize("column", ["lost", "worker", "attempt"])
    def test_running_task_with_an_invalid_column_fails_when_its_lease_ends(self, manager, column):
        (id,) = manager.create_task([{"number": 1}])
        manager.fetch_task()
        value = "[[" if column == "worker" else "abc"
        if is_refused(manager, id, deadline=None, **{column: value}):
            pytest.skip("the database refuses such a value")
        assert manager.wait(timeout=5) == {"failed": 1}
        assert f"the stored {column} is invalid" in manager.re_query(id)["error"]


@pytest.mark.parametrize("name", {**NO_JSON, **NO_OBJECT, **ODD_MAPPINGS, "good": GOOD})
def test_table_of_a_worker_shows_any_task(name):
    text = {**NO_JSON, **NO_OBJECT, **ODD_MAPPINGS, "good": GOOD}[name]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = {"stage": text}
    task = {"_id": "1", "def": value, "run": None}
    progress = value if isinstance(value, dict) else {"metrics": value, "epoch": value}
    console = Terminal(width=200, file=io.StringIO())
    console.print(worker_table("pool", [SlotStatus("slot 0", "cpu", task, progress=progress)]))
    assert "slot 0" in console.file.getvalue()


values = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.binary(max_size=20),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(
            ["model", "kwargs", "$recorder", "recorder_id", "metrics", "epoch", "tracking", "host"]
        ), inner, max_size=3),
        max_leaves=8,
    ).map(json.dumps),
)  # fmt: skip
rows = st.dictionaries(
    st.sampled_from(sorted({*FAULTS, *HARMLESS, "status"} - {"hash"})), values, max_size=4
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(rows, min_size=1, max_size=10))
def test_generated_rows_end_alone(tmp_path, capsys, columns_of_rows):
    manager = TaskManager("pool", f"sqlite:///{tmp_path}/tasks.db")
    manager.remove()
    ids = manager.create_task([{"number": k} for k in range(len(columns_of_rows) + 1)])
    for id, columns in zip(ids, columns_of_rows, strict=False):
        for column, value in columns.items():
            is_refused_null = column in ("definition", "tokens", "status") and value is None
            if not is_refused_null:
                with contextlib.suppress(Exception):  # NOT NULL
                    write(manager, id, **{column: value})
    run_commands(manager, capsys)
    run_task(lambda definition, run=None: 1, "pool", url=manager.url)
    tasks = list(manager.query(decode=False))
    assert {t["status"] for t in tasks} <= {"done", "failed", "waiting", "part_done", "running"}
    assert tasks[-1]["status"] == "done"
    assert all(t["error"] for t in tasks if t["status"] == "failed")
    assert not any(t["status"] == "waiting" for t in tasks)
    run_commands(manager, capsys)
    assert main(["tasks", "reset", "pool=pool", f"url={manager.url}"]) == 0
    assert main(["tasks", "remove", "pool=pool", f"url={manager.url}", "all=true"]) == 0
    assert manager.task_stat() == {}
    manager.close()


def test_part_done_task_whose_run_is_gone_fails_alone(tmp_path, monkeypatch):
    import qtorch

    monkeypatch.chdir(tmp_path)
    qtorch.init(tracking_uri=f"sqlite:///{tmp_path}/runs.db")
    manager = TaskManager("pool", f"sqlite:///{tmp_path}/tasks.db")
    manager.create_task([{"number": k} for k in range(2)])
    manager.commit_task_res(
        manager.fetch_task(), {"$recorder": {"recorder_id": "x"}}, status="part_done"
    )
    manager.commit_task_res(manager.fetch_task(), 1, status="part_done")
    run_task(increment, "pool", before_status="part_done", url=manager.url)
    first, second = manager.query(decode=False)
    assert (first["status"], second["status"], second["res"]) == ("failed", "done", 2)
    assert "NotInStoreError" in first["error"]
    manager.close()


def increment(result):
    return result + 1


@pytest.mark.parametrize("depth", [101, 5000])
def test_value_that_is_nested_too_deeply_is_not_stored(depth):
    value = 1
    for _ in range(depth):
        value = {"a": value}
    with pytest.raises(TaskDefinitionError, match="nested more than 100 levels"):
        encode_definition(value)
    with pytest.raises(TaskResultError, match="nested more than 100 levels"):
        encode_result(value)


def test_error_with_any_text_is_stored(manager):
    manager.create_task([{"number": 1}])
    manager.fail_task(manager.fetch_task(), "bad \udcff \0 \x1b[31m luck", "trace \ud800")
    (task,) = manager.query()
    assert task["error"] == "bad \\udcff  \x1b[31m luck"
    assert task["traceback"] == "trace \\ud800"


def test_value_that_no_store_can_hold_gives_an_error(make_manager):
    manager = make_manager()
    (id,) = manager.create_task([{"number": 1}])
    with pytest.raises(TaskStoreError):
        manager.prioritize({"_id": id}, 10**30)
    with pytest.raises(TaskStoreError, match=r"cannot hold|rejected"):
        TaskManager("pool\udcff", manager.url).task_stat()
