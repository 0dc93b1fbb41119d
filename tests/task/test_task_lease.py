"""Claims, leases, fences and waiting, on every store alike."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from pool_workers import until

from qtorch.core.errors import (
    ConfigError,
    LeaseLost,
    TaskResultError,
    TaskTimeout,
)
from qtorch.task.lease import LeaseKeeper


def lstm(seed: int, **more):
    return {"model": {"class": "LSTM", "module_path": "q.m", "kwargs": {"lr": 0.1}}, "seed": seed,
            **more}  # fmt: skip


def statuses(manager):
    return [t["status"] for t in manager.query(decode=False)]


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

    @pytest.mark.slow
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

    def test_progress_that_cannot_be_stored_costs_no_lease(self, make_manager):
        manager = make_manager(lease=0.6)
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        with LeaseKeeper(manager, task) as keeper:
            keeper.note({"tensor": object()})
            keeper.note_run({"recorder_id": "r"})
            until(lambda: manager.re_query(task["_id"])["run"])
            keeper.note({"epoch": 1})
            until(lambda: manager.re_query(task["_id"])["progress"] == {"epoch": 1})
            assert not keeper.lost.is_set()
            manager.commit_task_res(task, 1)
            time.sleep(0.2)
        assert not keeper.lost.is_set()  # a renewal after the commit is no loss

    @pytest.mark.slow
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


def test_threads_share_a_manager(manager):
    manager.create_task([lstm(k) for k in range(20)])

    def work(_):
        for task in manager.task_fetcher_iter():
            manager.commit_task_res(task, 1)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert manager.task_stat() == {"done": 20}
