"""Which environment variables Ray sees."""

from __future__ import annotations

from qtorch.cli.launchers.ray import _split_secrets


def test_variables_with_secrets_are_not_shown_to_ray():
    plain = {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": "http://host:5000"}
    secret = {
        "QTORCH_TASK_URL": "postgresql://me:pw@host/db",
        "QTORCH_URLS": '["http://me:pw@host"]',
        "MLFLOW_TRACKING_PASSWORD": "a",
        "MLFLOW_TRACKING_TOKEN": "a",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "a",
    }
    assert _split_secrets({**plain, **secret}) == (plain, secret)
