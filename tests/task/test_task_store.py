"""TaskManager on every store: definitions, queries, migrations, unavailable stores."""

from __future__ import annotations

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from pool_workers import wait_until

from qtorch.core.errors import (
    ConfigError,
    LeaseLost,
    TaskDefinitionError,
    TaskError,
    TaskStoreError,
    TaskStoreVersionError,
)
from qtorch.task import TaskManager
from qtorch.task.stores import sql
from qtorch.task.stores.base import Change


def lstm(seed: int, **fields):
    return {"model": {"class": "LSTM", "module_path": "q.m", "kwargs": {"lr": 0.1}}, "seed": seed,
            **fields}  # fmt: skip


class TestDefinitions:
    def test_equal_definitions_are_one_task(self, manager):
        ids = manager.create_task([lstm(1), lstm(2), lstm(1)])
        assert ids[0] == ids[2] != ids[1]
        equal_definition = {"seed": 2, "model": {"_target_": "q.m.LSTM", "lr": 0.1}}
        assert manager.create_task([equal_definition]) == [ids[1]]
        assert manager.insert_task_def(lstm(1)) == ids[0]
        assert manager.task_stat() == {"waiting": 2}

    def test_a_task_is_inserted_in_qlibs_form(self, manager):
        manager.create_task([lstm(1)])
        task_id = manager.insert_task(
            {"def": lstm(2), "filter": lstm(2), "status": "waiting", "priority": 3}
        )
        assert manager.insert_task({"def": lstm(2)}) == task_id
        assert manager.fetch_task()["_id"] == task_id
        with pytest.raises(TaskDefinitionError, match="column of a new task 'prio'"):
            manager.insert_task({"def": lstm(3), "prio": 1})
        with pytest.raises(TaskDefinitionError, match="and is waiting; got"):
            manager.insert_task({"def": lstm(3), "status": "done"})
        with pytest.raises(TaskDefinitionError, match="needs its definition as 'def'"):
            manager.insert_task({"filter": lstm(3)})

    def test_pools_of_a_store_are_separate(self, manager, make_manager, url):
        other_manager = make_manager(manager.task_pool + "-other")
        manager.create_task([lstm(1)])
        assert other_manager.fetch_task() is None
        assert other_manager.create_task([lstm(1)]) != manager.create_task([lstm(1)])
        assert {manager.task_pool, other_manager.task_pool} <= set(TaskManager.list(url))
        assert other_manager.remove() == 1
        assert other_manager.task_pool not in TaskManager.list(url)

    def test_dry_run_creates_no_task(self, manager):
        assert manager.create_task([lstm(1)], dry_run=True) == []
        assert manager.task_stat() == {}

    def test_create_task_without_definitions_returns_no_ids(self, manager):
        assert manager.create_task([]) == []

    def test_definition_is_read_back_unchanged(self, manager):
        definition = lstm(1, record=[{"a.b": "ä \u2028 \0", "$x": None}], span=("2020-01-01", 1.5))
        manager.create_task([definition])
        (task,) = manager.query()
        assert task["def"] == {**definition, "span": ["2020-01-01", 1.5]}
        assert manager.fetch_task()["def"] == task["def"]

    def test_live_object_in_a_definition_is_rejected_with_a_hint(self, manager):
        with pytest.raises(TaskDefinitionError, match=r"task\.model is a live object.*_target_"):
            manager.create_task([{"model": object()}])
        with pytest.raises(TaskDefinitionError, match="must be a dict; got str"):
            manager.create_task(["model"])
        assert manager.task_stat() == {}

    def test_replace_task_resets_the_task(self, manager):
        first, second = manager.create_task([lstm(1), lstm(2)])
        task = manager.fetch_task({"_id": first})
        manager.replace_task(task, lstm(3))
        with pytest.raises(LeaseLost):
            manager.commit_task_res(task, 1)
        assert manager.re_query(first)["def"] == lstm(3)
        assert [t["_id"] for t in manager.query({"seed": 3})] == [first]
        assert manager.create_task([lstm(3)]) == [first]
        with pytest.raises(TaskError, match=f"as task {second}"):
            manager.replace_task(task, lstm(2))

    def test_concurrent_create_task_creates_each_task_once(self, make_manager):
        definitions = [lstm(seed) for seed in range(30)]
        managers = [make_manager() for _ in range(4)]
        ready = threading.Barrier(4)

        def create(k):
            ready.wait(10)
            order = definitions if k % 2 else definitions[::-1]
            ids = managers[k].create_task(order)
            return ids if k % 2 else ids[::-1]

        with ThreadPoolExecutor(4) as threads:
            first, *further = threads.map(create, range(4))
        assert all(ids == first for ids in further)
        assert managers[0].task_stat() == {"waiting": 30}


class TestQueries:
    @pytest.fixture(autouse=True)
    def three_tasks(self, manager):
        fields = [{"flag": True, "n": 1}, {"flag": False, "n": 1.5}, {"flag": None, "n": "1"}]
        self.ids = manager.create_task([lstm(k, **fields[k]) for k in range(3)])

    @pytest.mark.parametrize(
        ("query", "numbers"),
        [
            ({}, [0, 1, 2]),
            ({"seed": 1}, [1]),
            ({"def.seed": 1.0}, [1]),
            ({"filter.seed": {"$in": [0, 2, 7]}}, [0, 2]),
            ({"model.class": "LSTM"}, [0, 1, 2]),
            ({"model.kwargs.lr": 0.1, "seed": 2}, [2]),
            ({"model._target_": "q.m.LSTM"}, [0, 1, 2]),
            ({"model.kwargs": {"lr": 0.1}}, [0, 1, 2]),
            ({"model": "LSTM"}, []),
            ({"flag": True}, [0]),
            ({"flag": None}, [2]),
            ({"n": 1}, [0]),
            ({"n": "1"}, [2]),
            ({"status": "waiting", "n": 1.5}, [1]),
            ({"status": {"$in": ["done", "failed"]}}, []),
            ({"seed": {"$in": []}}, []),
            ({"_id": "unknown"}, []),
            ({"_id": {"$in": []}}, []),
            ({"def": lstm(1, flag=False, n=1.5)}, [1]),
            ({"missing": 1}, []),
        ],
    )
    def test_query_matches_the_right_tasks(self, manager, query, numbers):
        ids = [self.ids[k] for k in numbers]
        assert [t["_id"] for t in manager.query(query)] == ids
        assert sum(manager.task_stat(query).values()) == len(ids)
        if "status" not in query:  # fetch_task sets its own status
            task = manager.fetch_task(query)
            assert (task and task["_id"]) == (ids[0] if ids else None)

    def test_query_by_id(self, manager):
        assert manager.re_query(self.ids[1])["def"]["seed"] == 1
        assert [t["_id"] for t in manager.query({"_id": {"$in": self.ids[:2]}})] == self.ids[:2]
        with pytest.raises(TaskError, match="has no task"):
            manager.re_query("99999999")

    @pytest.mark.parametrize("query", [{"seed": {"$gt": 1}}, {"seed": {"$in": [1], "$gt": 0}}])
    def test_unsupported_operators_are_rejected(self, manager, query):
        with pytest.raises(ConfigError, match=r"\$in"):
            manager.fetch_task(query)

    def test_unknown_status_suggests_the_nearest_name(self, manager):
        with pytest.raises(ConfigError, match="Did you mean 'waiting'"):
            manager.task_stat({"status": "wating"})

    def test_remove_deletes_the_matching_tasks(self, manager):
        assert manager.remove({"seed": {"$in": [0, 1]}}) == 2
        assert [t["def"]["seed"] for t in manager.query()] == [2]


class TestStores:
    def test_newer_schema_version_is_rejected(self, manager, url, monkeypatch):
        manager.create_task([lstm(1)])
        with monkeypatch.context() as patch:
            for module in ("base", "sql", "mongo"):
                patch.setattr(f"qtorch.task.stores.{module}.SCHEMA_VERSION", 0)
            with pytest.raises(TaskStoreVersionError, match=r"has version 1 .* knows up to 0"):
                TaskManager(manager.task_pool, url).task_stat()

    def test_older_schema_version_is_migrated_once(self, manager, url, monkeypatch):
        manager.create_task([lstm(1)])
        steps = []
        with monkeypatch.context() as patch:
            for module in ("base", "sql", "mongo"):
                patch.setattr(f"qtorch.task.stores.{module}.SCHEMA_VERSION", 2)
            text = "ALTER TABLE {tasks} ADD COLUMN extra TEXT"
            patch.setitem(sql.MIGRATIONS, 1, (text,))
            if url.startswith("mongo"):
                mongo = pytest.importorskip("qtorch.task.stores.mongo")
                patch.setitem(mongo.MIGRATIONS, 1, steps.append)
            for _ in range(2):
                new_manager = TaskManager(manager.task_pool, url)
                new_manager.create_task([lstm(1), lstm(2)])
                assert new_manager.task_stat() == {"waiting": 2}
                new_manager.close()
            assert len(steps) == url.startswith("mongo")
        with pytest.raises(TaskStoreVersionError, match=r"has version 2 .* knows up to 1"):
            TaskManager(manager.task_pool, url).task_stat()
        _undo_migration(manager)

    def test_deadlines_use_the_clock_of_the_server(self, manager, url, monkeypatch):
        """A machine whose clock is an hour ahead does not claim running tasks."""
        if url.startswith("sqlite"):
            pytest.skip("a SQLite store uses the clock of this machine")
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        hour_ahead = time.time() + 3600
        monkeypatch.setattr(time, "time", lambda: hour_ahead)
        assert manager.fetch_task() is None
        manager.renew(task)
        assert abs(manager.re_query(task["_id"])["deadline"] - task["deadline"]) < 60

    def test_task_with_an_invalid_definition_fails_and_the_next_is_fetched(self, manager):
        ids = manager.create_task([lstm(1), lstm(2), lstm(3)])
        store = manager._pool._store()
        for id, text in ((ids[0], '{"model": '), (ids[1], "[1]")):
            store.change_all(manager.task_pool, _id_condition(id), Change({"definition": text}))
        task = manager.fetch_task()
        assert task["_id"] == ids[2]
        truncated_task, list_task, _ = manager.query()
        assert (truncated_task["status"], list_task["status"]) == ("failed", "failed")
        assert "not valid JSON" in truncated_task["error"]
        assert truncated_task["def"] == '{"model": '
        assert "JSON list" in list_task["error"]

    def test_task_redefined_during_a_claim_is_not_claimed_by_its_old_definition(
        self, manager, url, monkeypatch
    ):
        if not url.startswith("mongo"):
            pytest.skip("on an SQL store a claim is one statement")
        (id,) = manager.create_task([lstm(1)])
        collection = type(manager._pool._store()._tasks)
        find, task = collection.find, manager.re_query(id)

        def find_and_redefine(*args, **kwargs):
            documents = list(find(*args, **kwargs))
            if "limit" in kwargs and documents:  # the claim's query
                manager.replace_task(task, lstm(2))
            return documents

        monkeypatch.setattr(collection, "find", find_and_redefine)
        assert manager.fetch_task({"seed": 1}) is None
        assert manager.fetch_task({"seed": 2})["_id"] == id

    def test_manager_can_be_pickled_and_reopened(self, manager):
        import pickle

        manager.create_task([lstm(1)])
        copy = pickle.loads(pickle.dumps(manager))
        manager.close()
        assert copy.task_stat() == manager.task_stat() == {"waiting": 1}
        copy.close()


def _undo_migration(manager):
    """Restore schema version 1, because all tests share the servers."""
    store = manager._pool._store()
    if manager.url.startswith("mongo"):
        store._database["qtorch_task_schema"].update_one({}, {"$set": {"version": 1}})
        return
    for text in (
        "DELETE FROM qtorch_task_schema WHERE version = 2",
        "ALTER TABLE qtorch_tasks DROP COLUMN extra",
    ):
        store._update(text, {})


def _id_condition(id):
    from qtorch.task.stores.base import parse_query

    return parse_query({"_id": id})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "in memory"),
        ("redis://x", "names no store.*unknown scheme 'redis'"),
        ("postgress://user:secret@host", r"Did you mean 'postgres'\?"),
        ("mlruns/tasks.db", "names no store.*'mlruns/tasks.db' has no scheme"),
        ("mongodb://h:port/x", "cannot be used"),
    ],
)
def test_invalid_url_raises_an_error_without_retry(url, message):
    if url.startswith("mongo"):
        pytest.importorskip("pymongo")
    with pytest.raises(TaskStoreError, match=message) as raised:
        TaskManager("p", url).task_stat()
    assert "secret" not in str(raised.value)


@pytest.mark.slow
def test_concurrent_workers_create_the_tables_of_a_new_store_once(postgres_url):
    """Eight workers find no tables; the first one to get the lock creates them."""
    import sqlalchemy as sa

    name = f"fresh_{uuid.uuid4().hex[:8]}"
    server = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    url = sa.make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    holder = sa.create_engine(url)
    managers = [TaskManager("p", url) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        with holder.begin() as lock:
            lock.exec_driver_sql(f"SELECT pg_advisory_xact_lock({sql.LOCK_KEY}, 0)")
            futures = [threads.submit(m.task_stat) for m in managers]
            count_waiting = (
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            )
            wait_until(lambda: lock.exec_driver_sql(count_waiting).scalar() == 8)
        assert [f.result() for f in futures] == [{}] * 8
    for manager in managers:
        manager.close()
    holder.dispose()
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")
    server.dispose()


def test_file_that_is_no_database_raises_an_error_without_retry(tmp_path):
    (tmp_path / "tasks.db").write_text("not a database\n" * 100)
    with pytest.raises(TaskStoreError, match="rejected a statement: file is not a database"):
        TaskManager("p", f"sqlite:///{tmp_path}/tasks.db").task_stat()


@pytest.mark.slow
def test_invalid_statement_raises_an_error_without_retry(postgres_url):
    """A statement or a value that the server or the driver rejects: not a missing connection."""
    store = sql.SqlStore(postgres_url)
    for statement, values in (
        ("SELECT * FROM missing_table", {}),
        ("SELECT 1 / :number", {"number": 0}),
        ("SELECT CAST(:text AS TEXT)", {"text": "a\0b"}),
    ):
        with pytest.raises(TaskStoreError, match="rejected a statement"):
            store._rows(statement, values)
    store.close()


def test_unavailable_store_raises_after_patience(tmp_path):
    pytest.importorskip("psycopg")
    manager = TaskManager("p", "postgresql://nobody@127.0.0.1:1/none", patience=0.3)
    begin = time.monotonic()
    with pytest.raises(TaskStoreError, match="has not answered for"):
        manager.task_stat()
    assert time.monotonic() - begin < 5


def test_fetch_waits_while_the_sqlite_file_is_locked(tmp_path):
    import sqlite3

    manager = TaskManager("p", f"sqlite:///{tmp_path}/t.db")
    manager.create_task([lstm(1)])
    lock = sqlite3.connect(tmp_path / "t.db", isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    tasks = []
    thread = threading.Thread(target=lambda: tasks.append(manager.fetch_task()))
    thread.start()
    time.sleep(0.3)
    assert not tasks
    lock.execute("COMMIT")
    wait_until(lambda: tasks)
    assert tasks[0]["attempt"] == 1
    lock.close()
    manager.close()
