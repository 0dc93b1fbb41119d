"""What TaskManager promises, on every store alike."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from pool_workers import until

from qtorch.core.errors import (
    ConfigError,
    LeaseLost,
    TaskDefinitionError,
    TaskError,
    TaskResultError,
    TaskStoreError,
    TaskStoreVersionError,
    TaskTimeout,
)
from qtorch.task import TaskManager
from qtorch.task.store import Change


def lstm(seed: int, **more):
    return {"model": {"class": "LSTM", "module_path": "q.m", "kwargs": {"lr": 0.1}}, "seed": seed,
            **more}  # fmt: skip


def statuses(manager):
    return [t["status"] for t in manager.query(decode=False)]


class TestDefinitions:
    def test_equal_definitions_are_one_task(self, manager):
        ids = manager.create_task([lstm(1), lstm(2), lstm(1)])
        assert ids[0] == ids[2] != ids[1]
        spelled = {"seed": 2, "model": {"_target_": "q.m.LSTM", "lr": 0.1}}
        assert manager.create_task([spelled]) == [ids[1]]
        assert manager.insert_task_def(lstm(1)) == ids[0]
        assert manager.task_stat() == {"waiting": 2}

    def test_pools_of_one_store_do_not_mix(self, manager, make_manager, url):
        other = make_manager(manager.task_pool + "-other")
        manager.create_task([lstm(1)])
        assert other.fetch_task() is None
        assert other.create_task([lstm(1)]) != manager.create_task([lstm(1)])
        assert {manager.task_pool, other.task_pool} <= set(TaskManager.list(url))
        assert other.remove() == 1
        assert other.task_pool not in TaskManager.list(url)

    def test_dry_run_makes_nothing(self, manager):
        assert manager.create_task([lstm(1)], dry_run=True) == []
        assert manager.task_stat() == {}

    def test_no_definitions_no_ids(self, manager):
        assert manager.create_task([]) == []

    def test_a_definition_comes_back_as_it_was_written(self, manager):
        definition = lstm(1, record=[{"a.b": "ä \u2028 \0", "$x": None}], span=("2020-01-01", 1.5))
        manager.create_task([definition])
        (task,) = manager.query()
        assert task["def"] == {**definition, "span": ["2020-01-01", 1.5]}
        assert manager.fetch_task()["def"] == task["def"]

    def test_a_live_object_is_refused_with_what_to_write(self, manager):
        with pytest.raises(TaskDefinitionError, match=r"task\.model is a live object.*_target_"):
            manager.create_task([{"model": object()}])
        with pytest.raises(TaskDefinitionError, match="is a dict; got str"):
            manager.create_task(["model"])
        assert manager.task_stat() == {}

    def test_replace(self, manager):
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

    def test_storms_make_each_task_once(self, make_manager):
        definitions = [lstm(seed) for seed in range(30)]
        managers = [make_manager() for _ in range(4)]
        ready = threading.Barrier(4)

        def create(k):
            ready.wait(10)
            order = definitions if k % 2 else definitions[::-1]
            ids = managers[k].create_task(order)
            return ids if k % 2 else ids[::-1]

        with ThreadPoolExecutor(4) as threads:
            first, *others = threads.map(create, range(4))
        assert all(ids == first for ids in others)
        assert managers[0].task_stat() == {"waiting": 30}


class TestQueries:
    @pytest.fixture(autouse=True)
    def filled(self, manager):
        more = [{"flag": True, "n": 1}, {"flag": False, "n": 1.5}, {"flag": None, "n": "1"}]
        self.ids = manager.create_task([lstm(k, **more[k]) for k in range(3)])

    @pytest.mark.parametrize(
        ("query", "found"),
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
            ({"_id": "nothing"}, []),
            ({"_id": {"$in": []}}, []),
            ({"def": lstm(1, flag=False, n=1.5)}, [1]),
            ({"missing": 1}, []),
        ],
    )
    def test_what_matches(self, manager, query, found):
        ids = [self.ids[k] for k in found]
        assert [t["_id"] for t in manager.query(query)] == ids
        assert sum(manager.task_stat(query).values()) == len(ids)
        if "status" not in query:  # a fetch brings its own
            task = manager.fetch_task(query)
            assert (task and task["_id"]) == (ids[0] if ids else None)

    def test_by_id(self, manager):
        assert manager.re_query(self.ids[1])["def"]["seed"] == 1
        assert [t["_id"] for t in manager.query({"_id": {"$in": self.ids[:2]}})] == self.ids[:2]
        with pytest.raises(TaskError, match="has no task"):
            manager.re_query("99999999")

    @pytest.mark.parametrize("query", [{"seed": {"$gt": 1}}, {"seed": {"$in": [1], "$gt": 0}}])
    def test_other_operators_are_refused(self, manager, query):
        with pytest.raises(ConfigError, match=r"\$in"):
            manager.fetch_task(query)

    def test_a_wrong_status_is_named(self, manager):
        with pytest.raises(ConfigError, match="Did you mean 'waiting'"):
            manager.task_stat({"status": "wating"})

    def test_remove(self, manager):
        assert manager.remove({"seed": {"$in": [0, 1]}}) == 2
        assert [t["def"]["seed"] for t in manager.query()] == [2]


class TestClaims:
    def test_priority_first_then_age(self, manager):
        ids = manager.create_task([lstm(k) for k in range(4)])
        manager.prioritize({"_id": ids[2]}, 5)
        manager.prioritize({"_id": ids[0]}, -1)
        order = [manager.fetch_task()["_id"] for _ in range(4)]
        assert order == [ids[2], ids[1], ids[3], ids[0]]
        assert manager.fetch_task() is None

    def test_a_claimed_task_says_who_has_it(self, manager):
        manager.create_task([lstm(1)])
        before = time.time()
        task = manager.fetch_task(worker="gpu-3")
        assert task == manager.re_query(task["_id"])
        assert (task["status"], task["attempt"], task["worker"]["id"]) == ("running", 1, "gpu-3")
        assert before - 5 < task["created"] <= task["updated"] < before + 5
        assert task["deadline"] - task["updated"] == pytest.approx(manager.lease, abs=0.1)
        assert manager.fetch_task() is None

    def test_many_claimants_get_each_task_once(self, make_manager):
        managers = [make_manager() for _ in range(6)]
        ids = managers[0].create_task([lstm(k) for k in range(40)])

        def take(manager):
            taken = []
            while (task := manager.fetch_task()) is not None:
                taken.append(task["_id"])
                manager.commit_task_res(task, task["def"]["seed"])
            return taken

        with ThreadPoolExecutor(6) as threads:
            taken = [id for each in threads.map(take, managers) for id in each]
        assert sorted(taken) == sorted(ids)
        assert managers[0].task_stat() == {"done": 40}

    def test_results_come_back(self, manager):
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        with pytest.raises(TaskResultError, match=r"the result\['model'\] is a object"):
            manager.commit_task_res(task, {"model": object()})
        manager.commit_task_res(task, {"ic": (0.1, None, float("inf")), "name": "ä"})
        done = manager.re_query(task["_id"])
        assert (done["status"], done["deadline"]) == ("done", None)
        assert done["res"] == {"ic": [0.1, None, float("inf")], "name": "ä"}

    def test_part_done_goes_on_from_its_result(self, manager):
        manager.create_task([lstm(1)])
        manager.commit_task_res(manager.fetch_task(), {"step": 1}, status="part_done")
        assert manager.fetch_task() is None
        task = manager.fetch_task(status="part_done")
        assert (task["res"], task["attempt"]) == ({"step": 1}, 2)
        manager.return_task(task, "part_done", preempted=True)
        task = manager.fetch_task(status="part_done")
        manager.commit_task_res(task, {"step": 2})
        assert manager.re_query(task["_id"])["res"] == {"step": 2}

    def test_a_commit_sent_twice_is_one(self, manager):
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        manager.commit_task_res(task, 1)
        manager.commit_task_res(task, 1)
        assert manager.re_query(task["_id"])["res"] == 1

    def test_the_answer_to_a_claim_may_get_lost(self, manager, monkeypatch):
        """The claim reached the store, its answer did not come back: the same task, once."""
        from qtorch.task.store import StoreAway

        manager.create_task([lstm(1), lstm(2)])
        store = manager._pool._store()
        claim, cut = store.claim, [True]

        def claim_and_lose(*arguments):
            row = claim(*arguments)
            if cut.pop() if cut else False:
                raise StoreAway("connection lost")
            return row

        monkeypatch.setattr(store, "claim", claim_and_lose)
        task = manager.fetch_task()
        assert task["attempt"] == 1
        assert manager.task_stat() == {"running": 1, "waiting": 1}

    def test_renewal_tells_run_and_progress(self, manager):
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        run = {"experiment_id": "1", "recorder_id": "r", "tracking_uri": "u"}
        manager.renew(task, progress={"epoch": 3}, run=run)
        shown = manager.re_query(task["_id"])
        assert (shown["progress"], shown["run"]) == ({"epoch": 3}, run)
        assert shown["deadline"] > task["deadline"]
        manager.return_task(task, preempted=True)
        again = manager.fetch_task()
        assert (again["run"], again["progress"], again["preemptions"]) == (run, None, 1)


class TestLeases:
    def test_an_expired_lease_is_taken_by_the_next(self, make_manager):
        first, second = make_manager(lease=0.2), make_manager()
        first.create_task([lstm(1), lstm(2)])
        old = first.fetch_task()
        time.sleep(0.4)
        new = second.fetch_task()  # the oldest again, before the other one
        assert new["_id"] == old["_id"]
        assert (new["attempt"], new["lost"], new["errors"]) == (2, 1, 0)
        for refused in (
            lambda: first.commit_task_res(old, "old"),
            lambda: first.renew(old),
        ):
            with pytest.raises(LeaseLost, match="attempt 1 holds no lease"):
                refused()
        assert first.return_task(old, error="x") is False
        second.commit_task_res(new, "new")
        with pytest.raises(LeaseLost):
            first.commit_task_res(old, "old")
        done = second.re_query(new["_id"])
        assert (done["res"], done["status"], done["errors"]) == ("new", "done", 0)

    def test_renewals_keep_it(self, make_manager):
        first, second = make_manager(lease=0.5), make_manager()
        first.create_task([lstm(1)])
        task = first.fetch_task()
        for _ in range(8):
            time.sleep(0.1)
            first.renew(task)
            assert second.fetch_task() is None
        first.commit_task_res(task, 1)

    def test_one_that_nobody_took_may_still_commit(self, make_manager):
        manager = make_manager(lease=0.1)
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        time.sleep(0.3)
        manager.commit_task_res(task, 1)
        assert manager.re_query(task["_id"])["lost"] == 0

    def test_lost_leases_are_capped(self, make_manager):
        manager = make_manager(lease=0.05, max_lost=3)
        manager.create_task([lstm(1)])
        for attempt in (1, 2, 3):
            assert manager.fetch_task()["attempt"] == attempt
            time.sleep(0.15)
        assert manager.fetch_task() is None
        (task,) = manager.query()
        assert (task["status"], task["lost"], task["errors"]) == ("failed", 3, 0)
        assert "lost its lease on" in task["error"]

    def test_errors_are_capped_and_told(self, manager):
        manager.create_task([lstm(1)])
        for attempt in (1, 2, 3):
            task = manager.fetch_task()
            assert (task["attempt"], task["errors"]) == (attempt, attempt - 1)
            try:
                raise ValueError("bad \0 luck")
            except ValueError as error:
                manager.return_task(task, error=error)
        assert manager.fetch_task() is None
        failed = manager.re_query(task["_id"])
        assert (failed["status"], failed["errors"], failed["lost"]) == ("failed", 3, 0)
        assert failed["error"].startswith("ValueError: bad")
        assert 'raise ValueError("bad' in failed["traceback"]
        assert failed["worker"]["host"]

    def test_preemptions_count_as_neither(self, make_manager):
        manager = make_manager(max_errors=1, max_lost=1)
        manager.create_task([lstm(1)])
        for _ in range(5):
            assert manager.return_task(manager.fetch_task(), preempted=True)
        task = manager.fetch_task()
        assert (task["preemptions"], task["errors"], task["lost"]) == (5, 0, 0)

    def test_a_reset_takes_the_lease_and_forgets_the_errors(self, manager):
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        assert manager.reset_waiting() == 1
        with pytest.raises(LeaseLost):
            manager.commit_task_res(task, 1)
        task = manager.fetch_task()
        manager.fail_task(task, "no use")
        assert manager.reset_status({"status": "failed"}, "waiting") == 1
        task = manager.fetch_task()
        assert (task["errors"], task["error"], task["attempt"]) == (0, None, 3)
        with pytest.raises(ConfigError, match="fetches it"):
            manager.reset_status({}, "running")

    def test_safe_fetch(self, make_manager):
        manager = make_manager(lease=0.4, max_errors=2)
        manager.create_task([lstm(1)])
        with pytest.raises(ZeroDivisionError), manager.safe_fetch_task() as task:
            time.sleep(0.8)  # a thread renews
            1 / 0
        with pytest.raises(KeyboardInterrupt), manager.safe_fetch_task() as task:
            raise KeyboardInterrupt
        with manager.safe_fetch_task() as task:
            manager.commit_task_res(task, 1)
        done = manager.re_query(task["_id"])
        assert (done["attempt"], done["errors"], done["preemptions"], done["lost"]) == (3, 1, 1, 0)
        with manager.safe_fetch_task() as nothing:
            assert nothing is None

    def test_fetcher(self, manager):
        manager.create_task([lstm(k) for k in range(3)])
        for task in manager.task_fetcher_iter():
            manager.commit_task_res(task, task["def"]["seed"])
        assert [t["res"] for t in manager.query()] == [0, 1, 2]


class TestWaiting:
    def test_it_wakes_within_a_second_of_the_last_commit(self, make_manager):
        manager, worker = make_manager(), make_manager()
        manager.create_task([lstm(1), lstm(2)])
        committed, told = [], []

        def work():
            for task in worker.task_fetcher_iter():
                time.sleep(0.3)
                if task["def"]["seed"] == 2:
                    worker.fail_task(task, "no luck")
                else:
                    worker.commit_task_res(task, 1)
                committed.append(time.monotonic())

        thread = threading.Thread(target=work)
        thread.start()
        result = manager.wait(timeout=20, on_progress=told.append)
        late = time.monotonic() - committed[-1] if committed else 0
        thread.join()
        assert late < 1.0
        assert result == {"done": 1, "failed": 1}
        assert [t["error"] for t in result.failed] == ["no luck"]
        assert told[-1] == result
        assert len(told) >= 2

    def test_a_timeout_names_what_is_unfinished(self, manager):
        ids = manager.create_task([lstm(1), lstm(2)])
        manager.commit_task_res(manager.fetch_task({"_id": ids[0]}), 1)
        with pytest.raises(TaskTimeout, match=f"{ids[1]} \\(waiting\\)") as caught:
            manager.wait(timeout=0.1)
        assert caught.value.unfinished == [ids[1]]
        assert manager.wait({"_id": ids[0]}) == {"done": 1}

    def test_it_takes_back_what_the_dead_hold(self, make_manager):
        manager = make_manager(lease=0.2)
        manager.create_task([lstm(1)])
        manager.fetch_task()
        with pytest.raises(TaskTimeout):
            manager.wait(timeout=0.6)
        assert statuses(manager) == ["waiting"]


class TestStores:
    def test_a_newer_schema_is_refused_by_name(self, make_manager, monkeypatch):
        make_manager().create_task([lstm(1)])
        for module in ("sql", "mongo"):
            monkeypatch.setattr(f"qtorch.task.{module}.SCHEMA_VERSION", 0)
        with pytest.raises(TaskStoreVersionError, match=r"has version 1 .* knows up to 0"):
            make_manager().task_stat()

    def test_an_unreadable_definition_is_failed_and_the_next_taken(self, manager):
        ids = manager.create_task([lstm(1), lstm(2), lstm(3)])
        store = manager._pool._store()
        for id, text in ((ids[0], '{"model": '), (ids[1], "[1]")):
            store.change_all(manager.task_pool, _only(id), Change({"definition": text}))
        task = manager.fetch_task()
        assert task["_id"] == ids[2]
        broken, listed, _ = manager.query()
        assert (broken["status"], listed["status"]) == ("failed", "failed")
        assert "no JSON" in broken["error"]
        assert broken["def"] == '{"model": '
        assert "JSON list" in listed["error"]

    def test_pickled_and_forgotten_connections(self, manager):
        import pickle

        manager.create_task([lstm(1)])
        twin = pickle.loads(pickle.dumps(manager))
        manager.close()
        assert twin.task_stat() == manager.task_stat() == {"waiting": 1}
        twin.close()


def _only(id):
    from qtorch.task.query import parse_query

    return parse_query({"_id": id})


def test_threads_share_a_manager(manager):
    manager.create_task([lstm(k) for k in range(20)])

    def work(_):
        for task in manager.task_fetcher_iter():
            manager.commit_task_res(task, 1)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert manager.task_stat() == {"done": 20}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://", "in memory"),
        ("redis://x", "names no store"),
        ("mlruns/tasks.db", "names no store"),
        ("mongodb://h:port/x", "cannot be used"),
    ],
)
def test_a_wrong_url_says_so_at_once(url, said):
    if url.startswith("mongo"):
        pytest.importorskip("pymongo")
    with pytest.raises(TaskStoreError, match=said):
        TaskManager("p", url).task_stat()


def test_patience_ends(tmp_path):
    pytest.importorskip("psycopg")
    manager = TaskManager("p", "postgresql://nobody@127.0.0.1:1/none", patience=0.3)
    begin = time.monotonic()
    with pytest.raises(TaskStoreError, match="has not answered for"):
        manager.task_stat()
    assert time.monotonic() - begin < 5


def test_waiting_outlives_a_locked_file(tmp_path):
    import sqlite3

    manager = TaskManager("p", f"sqlite:///{tmp_path}/t.db")
    manager.create_task([lstm(1)])
    lock = sqlite3.connect(tmp_path / "t.db", isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    taken = []
    thread = threading.Thread(target=lambda: taken.append(manager.fetch_task()))
    thread.start()
    time.sleep(0.3)
    assert not taken
    lock.execute("COMMIT")
    until(lambda: taken)
    assert taken[0]["attempt"] == 1
    lock.close()
    manager.close()
