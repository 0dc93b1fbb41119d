"""Train and score with networks of conf/model in mixed precision on the pretended device.

    python mixed_precision.py FILE [NAME ...]

writes a JSON object to FILE: the error of each network, or null.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from pretended_cuda import PretendedCuda  # noqa: E402  # before torch

# isort: split
import torch  # noqa: E402
from small_networks import network_config, network_dataset, network_names  # noqa: E402

from qtorch.core.instantiate import init_instance_by_config  # noqa: E402


def find_error(name: str) -> str | None:
    """Return the error of a training and a prediction, None if there is none."""
    dataset = network_dataset(name)
    try:
        model = init_instance_by_config(network_config(name, precision="bf16-mixed"))
        model.fit(dataset)
        assert model.predict(dataset).notna().all()
    except Exception:
        return traceback.format_exc()
    return None


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with PretendedCuda():
        errors = {name: find_error(name) for name in names or network_names()}
    Path(path).write_text(json.dumps(errors, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
