"""Tests of rolling studies that are interrupted and repeated."""

from __future__ import annotations

import pandas as pd
import pytest

from qtorch import R
from qtorch.model.lightning_model import LightningModel
from qtorch.study import StudyError, WarmStart, rolling_study
from qtorch.tracking.recorder import PARENT_TAG
from qtorch.trainer import DelayTrainerR, FleetTrainer, TrainerR, TrainerRM

pytestmark = pytest.mark.slow

LAST_WINDOW = "2019-04-01"  # the last of three windows is tested after this date


class EqualWeights:
    """A reweighter that has no configuration."""

    def reweight(self, data):
        return pd.Series(1.0, index=data.index)


def run_study(task, trainer=None, **options):
    return rolling_study(task, trainer, experiment_name="study", cache=False, **options)


@pytest.fixture
def fits(monkeypatch):
    """A list of the first test days of all trainings, and an error to raise in the last window."""

    class Fits(list):
        error: BaseException | None = None

    fits = Fits()

    def fit(self, dataset, *args, **options):
        first_day = str(dataset.segments["test"][0])
        fits.append(first_day)
        if fits.error is not None and first_day > LAST_WINDOW:
            raise fits.error
        return real_fits[type(self)](self, dataset, *args, **options)

    real_fits = {kind: kind.fit for kind in (LightningModel, WarmStart)}
    for kind in real_fits:
        monkeypatch.setattr(kind, "fit", fit)
    return fits


def list_runs():
    """Return the runs of studies and of windows in the experiment."""
    runs = list(R.list_recorders(experiment_name="study").values())
    studies = [r for r in runs if PARENT_TAG not in r.list_tags()]
    return studies, [r for r in runs if r not in studies]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no luck")])
@pytest.mark.parametrize("warm_start", [False, True])
def test_repeated_study_trains_only_what_is_missing(store, make_task, fits, error, warm_start):
    reference = rolling_study(make_task(), warm_start=warm_start, cache=False)
    fits.clear()
    fits.error = error
    with pytest.raises(type(error) if isinstance(error, KeyboardInterrupt) else StudyError):
        run_study(make_task(), warm_start=warm_start)
    (study,), windows = list_runs()
    assert study.status in ("KILLED", "FAILED")
    first_fits, fits.error = list(fits), None
    assert len(first_fits) == 3

    result = run_study(make_task(), warm_start=warm_start)
    assert list(fits) == [*first_fits, first_fits[-1]]
    (repeated_study,), repeated_windows = list_runs()
    assert repeated_study.id == study.id == result.recorder.id
    assert repeated_study.status == "FINISHED"
    assert "error" not in repeated_study.list_tags()
    assert {r.id for r in repeated_windows} == {r.id for r in windows}
    assert [r.list_tags()["rolling.window"] for r in result.windows] == ["0", "1", "2"]
    assert {r.status for r in repeated_windows} == {"FINISHED"}
    pd.testing.assert_frame_equal(result.prediction, reference.prediction, check_exact=True)
    metrics, expected = result.recorder.list_metrics(), reference.recorder.list_metrics()
    assert metrics == expected


def test_finished_study_is_not_continued(store, make_task, fits):
    first = run_study(make_task())
    second = run_study(make_task())
    assert len(fits) == 6
    assert first.recorder.id != second.recorder.id


def test_changed_study_and_resume_false_start_a_new_study(store, make_task, fits):
    fits.error = KeyboardInterrupt()
    for options in ({}, {"rtype": "sliding"}, {"horizon": 3}, {"resume": False}):
        with pytest.raises(KeyboardInterrupt):
            run_study(make_task(), **options)
    assert len(fits) == 12
    assert len(list_runs()[0]) == 4


def test_fleet_continues_a_study(store, make_task, fits):
    fits.error = ValueError("no luck")
    with pytest.raises(StudyError):
        run_study(make_task(), FleetTrainer("study"))
    fits.error = None
    result = run_study(make_task(), FleetTrainer("study"))
    assert len(fits) == 4
    assert len(list_runs()[0]) == 1
    reference = rolling_study(make_task(), FleetTrainer("other"), cache=False)
    pd.testing.assert_frame_equal(result.prediction, reference.prediction)


def test_study_of_a_task_pool_goes_on_in_its_run(store, make_task, fits):
    fits.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_study(make_task(), TrainerRM("study", "windows"))
    fits.error = None
    result = run_study(make_task(), TrainerRM("study", "windows"))
    assert len(fits) == 4
    (study,), windows = list_runs()
    assert (study.id, study.status) == (result.recorder.id, "FINISHED")
    assert {r.id for r in result.windows} == {r.id for r in windows}
    reference = rolling_study(make_task(), cache=False)
    pd.testing.assert_frame_equal(result.prediction, reference.prediction, check_exact=True)


def test_random_seed_of_the_interrupted_study_is_kept(store, make_task, fits):
    task = make_task()
    del task["seed"]
    fits.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_study(task)
    fits.error = None
    result = run_study(task)
    assert len(fits) == 4
    seeds = {r.load_object("task")["seed"] for r in (result.recorder, *result.windows)}
    assert len(seeds) == 1


@pytest.mark.parametrize("case", ["delayed trainer", "own training function", "live object"])
def test_studies_whose_windows_cannot_be_compared_start_again(store, make_task, fits, case):
    task, trainer = make_task(), TrainerR("study")
    if case == "delayed trainer":
        trainer = DelayTrainerR("study")
    elif case == "own training function":
        train = trainer.train_func
        trainer.train_func = lambda *arguments, **options: train(*arguments, **options)
    else:
        task["reweighter"] = EqualWeights()
    fits.error = ValueError("no luck")
    for _ in range(2):
        with pytest.raises(StudyError):
            run_study(task, trainer)
    assert len(fits) == 6
    assert len(list_runs()[0]) == 2
