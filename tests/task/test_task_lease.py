"""Claims, leases, commits and waiting, on every store."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from pool_workers import wait_until

from qtorch.core.errors import ConfigError, LeaseLost, TaskResultError, TaskTimeout
from qtorch.task.manager import LeaseRenewer


def lstm(seed: int, **fields):
    return {"model": {"class": "LSTM", "module_path": "q.m", "kwargs": {"lr": 0.1}}, "seed": seed,
            **fields}  # fmt: skip


def statuses(manager):
    return [t["status"] for t in manager.query(decode=False)]


class TestClaims:
    def test_fetch_order_is_priority_then_age(self, manager):
        ids = manager.create_task([lstm(k) for k in range(4)])
        manager.prioritize({"_id": ids[2]}, 5)
        manager.prioritize({"_id": ids[0]}, -1)
        order = [manager.fetch_task()["_id"] for _ in range(4)]
        assert order == [ids[2], ids[1], ids[3], ids[0]]
        assert manager.fetch_task() is None

    def test_claimed_task_has_worker_and_deadline(self, manager):
        manager.create_task([lstm(1)])
        before = time.time()
        task = manager.fetch_task(worker="gpu-3")
        assert task == manager.re_query(task["_id"])
        assert (task["status"], task["attempt"], task["worker"]["id"]) == ("running", 1, "gpu-3")
        assert before - 5 < task["created"] <= task["updated"] < before + 5
        assert task["deadline"] - task["updated"] == pytest.approx(manager.lease, abs=0.1)
        assert manager.fetch_task() is None

    def test_concurrent_workers_claim_each_task_once(self, make_manager):
        managers = [make_manager() for _ in range(6)]
        ids = managers[0].create_task([lstm(k) for k in range(40)])

        def run_all(manager):
            ids = []
            while (task := manager.fetch_task()) is not None:
                ids.append(task["_id"])
                manager.commit_task_res(task, task["def"]["seed"])
            return ids

        with ThreadPoolExecutor(6) as threads:
            claimed_ids = [id for each in threads.map(run_all, managers) for id in each]
        assert sorted(claimed_ids) == sorted(ids)
        assert managers[0].task_stat() == {"done": 40}

    def test_results_are_stored_as_json(self, manager):
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        with pytest.raises(TaskResultError, match=r"result\.model is a object"):
            manager.commit_task_res(task, {"model": object()})
        manager.commit_task_res(task, {"ic": (0.1, None, float("inf")), "name": "ä"})
        done_task = manager.re_query(task["_id"])
        assert (done_task["status"], done_task["deadline"]) == ("done", None)
        assert done_task["res"] == {"ic": [0.1, None, float("inf")], "name": "ä"}

    def test_part_done_task_continues_from_its_result(self, manager):
        manager.create_task([lstm(1)])
        manager.commit_task_res(manager.fetch_task(), {"step": 1}, status="part_done")
        assert manager.fetch_task() is None
        task = manager.fetch_task(status="part_done")
        assert (task["res"], task["attempt"]) == ({"step": 1}, 2)
        manager.return_task(task, "part_done", is_preempted=True)
        task = manager.fetch_task(status="part_done")
        manager.commit_task_res(task, {"step": 2})
        assert manager.re_query(task["_id"])["res"] == {"step": 2}

    def test_commit_is_idempotent(self, manager):
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        manager.commit_task_res(task, 1)
        manager.commit_task_res(task, 1)
        assert manager.re_query(task["_id"])["res"] == 1

    def test_claim_whose_answer_is_lost_is_not_repeated(self, manager, monkeypatch):
        """The claim succeeds, but the connection is lost before the answer: a retry finds it."""
        from qtorch.task.stores.base import StoreUnavailable

        manager.create_task([lstm(1), lstm(2)])
        store = manager._pool._store()
        claim, failures = store.claim, [True]

        def claim_and_disconnect(*arguments):
            row = claim(*arguments)
            if failures.pop() if failures else False:
                raise StoreUnavailable("connection lost")
            return row

        monkeypatch.setattr(store, "claim", claim_and_disconnect)
        task = manager.fetch_task()
        assert task["attempt"] == 1
        assert manager.task_stat() == {"running": 1, "waiting": 1}

    def test_renewal_stores_run_and_progress(self, manager):
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        run = {"experiment_id": "1", "recorder_id": "r", "tracking_uri": "u"}
        manager.renew(task, progress={"epoch": 3}, run=run)
        stored_task = manager.re_query(task["_id"])
        assert (stored_task["progress"], stored_task["run"]) == ({"epoch": 3}, run)
        assert stored_task["deadline"] > task["deadline"]
        manager.return_task(task, is_preempted=True)
        next_attempt = manager.fetch_task()
        assert (next_attempt["run"], next_attempt["progress"], next_attempt["preemptions"]) == (
            run,
            None,
            1,
        )


class TestLeases:
    def test_task_with_an_expired_lease_is_claimed_by_the_next_worker(self, make_manager):
        first, second = make_manager(lease=0.2), make_manager()
        first.create_task([lstm(1), lstm(2)])
        old = first.fetch_task()
        time.sleep(0.4)
        new = second.fetch_task()  # the oldest task comes first
        assert new["_id"] == old["_id"]
        assert (new["attempt"], new["lost"], new["errors"]) == (2, 1, 0)
        for change in (
            lambda: first.commit_task_res(old, "old"),
            lambda: first.renew(old),
        ):
            with pytest.raises(LeaseLost, match=r"attempt 1 of task .* holds no lease"):
                change()
        assert first.return_task(old, error="x") is False
        second.commit_task_res(new, "new")
        with pytest.raises(LeaseLost):
            first.commit_task_res(old, "old")
        done_task = second.re_query(new["_id"])
        assert (done_task["res"], done_task["status"], done_task["errors"]) == ("new", "done", 0)

    def test_reclaimed_task_counts_a_lost_lease_and_not_also_an_error(self, make_manager):
        """It is waiting again, as after a return, but another process has returned it."""
        first, second = make_manager(lease=0.1), make_manager()
        first.create_task([lstm(1)])
        task = first.fetch_task()
        time.sleep(0.3)
        assert second.reclaim_expired_leases() == 1
        for arguments in ({"error": "x"}, {"is_preempted": True}, {}):
            assert first.return_task(task, **arguments) is False
        task = second.re_query(task["_id"])
        assert (task["status"], task["errors"], task["lost"]) == ("waiting", 0, 1)

    @pytest.mark.parametrize("arguments", [{"error": "x"}, {"is_preempted": True}, {}])
    def test_return_whose_answer_is_lost_is_not_repeated(self, manager, monkeypatch, arguments):
        """The return succeeds, but the connection is lost before the answer."""
        from qtorch.task.stores.base import StoreUnavailable

        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        store = manager._pool._store()
        change, failures = store.change, [True]

        def change_and_disconnect(*arguments):
            is_changed = change(*arguments)
            if failures.pop() if failures else False:
                raise StoreUnavailable("connection lost")
            return is_changed

        monkeypatch.setattr(store, "change", change_and_disconnect)
        assert manager.return_task(task, **arguments) is True
        task = manager.re_query(task["_id"])
        assert (task["errors"] + task["preemptions"], task["lost"]) == (len(arguments), 0)

    def test_unpickled_manager_reclaims_expired_leases_at_once(self, manager, make_manager):
        """The monotonic clock of another machine says nothing about the last search here."""
        first = make_manager(lease=0.1)
        ids = first.create_task([lstm(1), lstm(2)])
        first.fetch_task()
        pickled_manager = pickle.dumps(first)
        time.sleep(0.3)
        copy = pickle.loads(pickled_manager)
        assert copy.fetch_task()["_id"] == ids[0]
        copy.close()

    @pytest.mark.slow
    def test_renewals_keep_the_lease(self, make_manager):
        first, second = make_manager(lease=0.5), make_manager()
        first.create_task([lstm(1)])
        task = first.fetch_task()
        for _ in range(8):
            time.sleep(0.1)
            first.renew(task)
            assert second.fetch_task() is None
        first.commit_task_res(task, 1)

    def test_commit_after_the_deadline_is_accepted_if_nobody_claimed_the_task(self, make_manager):
        manager = make_manager(lease=0.1)
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        time.sleep(0.3)
        manager.commit_task_res(task, 1)
        assert manager.re_query(task["_id"])["lost"] == 0

    def test_task_fails_after_max_lost_leases(self, make_manager):
        manager = make_manager(lease=0.05, max_lost=3)
        manager.create_task([lstm(1)])
        for attempt in (1, 2, 3):
            assert manager.fetch_task()["attempt"] == attempt
            time.sleep(0.15)
        assert manager.fetch_task() is None
        (task,) = manager.query()
        assert (task["status"], task["lost"], task["errors"]) == ("failed", 3, 0)
        assert "lost its lease on" in task["error"]

    def test_task_fails_after_max_errors_with_the_last_error(self, manager):
        manager.create_task([lstm(1)])
        for attempt in (1, 2, 3):
            task = manager.fetch_task()
            assert (task["attempt"], task["errors"]) == (attempt, attempt - 1)
            try:
                raise ValueError("bad \0 luck")
            except ValueError as error:
                manager.return_task(task, error=error)
        assert manager.fetch_task() is None
        failed_task = manager.re_query(task["_id"])
        assert (failed_task["status"], failed_task["errors"], failed_task["lost"]) == (
            "failed",
            3,
            0,
        )
        assert failed_task["error"].startswith("ValueError: bad")
        assert 'raise ValueError("bad' in failed_task["traceback"]
        assert failed_task["worker"]["host"]

    def test_preemptions_count_neither_as_error_nor_as_lost_lease(self, make_manager):
        manager = make_manager(max_errors=1, max_lost=1)
        manager.create_task([lstm(1)])
        for _ in range(5):
            assert manager.return_task(manager.fetch_task(), is_preempted=True)
        task = manager.fetch_task()
        assert (task["preemptions"], task["errors"], task["lost"]) == (5, 0, 0)

    def test_reset_revokes_the_lease_and_clears_the_errors(self, manager):
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
        with pytest.raises(ConfigError, match="cannot be set to running"):
            manager.reset_status({}, "running")

    def test_progress_that_cannot_be_stored_does_not_lose_the_lease(self, make_manager):
        manager = make_manager(lease=0.6)
        manager.create_task([lstm(1)])
        task = manager.fetch_task()
        with LeaseRenewer(manager, task) as lease:
            lease.report_progress({"tensor": object()})
            lease.report_run({"recorder_id": "r"})
            wait_until(lambda: manager.re_query(task["_id"])["run"])
            lease.report_progress({"epoch": 1})
            wait_until(lambda: manager.re_query(task["_id"])["progress"] == {"epoch": 1})
            assert not lease.lease_lost.is_set()
            manager.commit_task_res(task, 1)
            time.sleep(0.2)
        assert (
            not lease.lease_lost.is_set()
        )  # a failed renewal after the commit is not a lost lease

    @pytest.mark.slow
    def test_safe_fetch_task_renews_and_returns_the_task(self, make_manager):
        manager = make_manager(lease=0.4, max_errors=2)
        manager.create_task([lstm(1)])
        with pytest.raises(ZeroDivisionError), manager.safe_fetch_task() as task:
            time.sleep(0.8)  # longer than the lease, which a thread renews
            1 / 0
        with pytest.raises(KeyboardInterrupt), manager.safe_fetch_task() as task:
            raise KeyboardInterrupt
        with manager.safe_fetch_task() as task:
            manager.commit_task_res(task, 1)
        done_task = manager.re_query(task["_id"])
        assert (
            done_task["attempt"],
            done_task["errors"],
            done_task["preemptions"],
            done_task["lost"],
        ) == (3, 1, 1, 0)
        with manager.safe_fetch_task() as no_task:
            assert no_task is None

    def test_task_fetcher_iter_yields_all_tasks(self, manager):
        manager.create_task([lstm(k) for k in range(3)])
        for task in manager.task_fetcher_iter():
            manager.commit_task_res(task, task["def"]["seed"])
        assert [t["res"] for t in manager.query()] == [0, 1, 2]


class TestWaiting:
    def test_wait_returns_within_a_second_of_the_last_commit(self, make_manager):
        manager, worker = make_manager(), make_manager()
        manager.create_task([lstm(1), lstm(2)])
        commit_times, reports = [], []

        def work():
            for task in worker.task_fetcher_iter():
                time.sleep(0.3)
                if task["def"]["seed"] == 2:
                    worker.fail_task(task, "no luck")
                else:
                    worker.commit_task_res(task, 1)
                commit_times.append(time.monotonic())

        thread = threading.Thread(target=work)
        thread.start()
        result = manager.wait(timeout=20, on_progress=reports.append)
        delay = time.monotonic() - commit_times[-1] if commit_times else 0
        thread.join()
        assert delay < 1.0
        assert result == {"done": 1, "failed": 1}
        assert [t["error"] for t in result.failed_tasks] == ["no luck"]
        assert reports[-1] == result
        assert len(reports) >= 2

    def test_timeout_error_names_the_unfinished_tasks(self, manager):
        ids = manager.create_task([lstm(1), lstm(2)])
        manager.commit_task_res(manager.fetch_task({"_id": ids[0]}), 1)
        with pytest.raises(TaskTimeout, match=f"{ids[1]} \\(waiting\\)") as error_info:
            manager.wait(timeout=0.1)
        assert error_info.value.unfinished_ids == [ids[1]]
        assert manager.wait({"_id": ids[0]}) == {"done": 1}

    def test_wait_returns_the_tasks_of_dead_workers_to_the_pool(self, make_manager):
        manager = make_manager(lease=0.2)
        manager.create_task([lstm(1)])
        manager.fetch_task()
        with pytest.raises(TaskTimeout):
            manager.wait(timeout=0.6)
        assert statuses(manager) == ["waiting"]


def test_threads_can_share_a_manager(manager):
    manager.create_task([lstm(k) for k in range(20)])

    def work(_):
        for task in manager.task_fetcher_iter():
            manager.commit_task_res(task, 1)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert manager.task_stat() == {"done": 20}
