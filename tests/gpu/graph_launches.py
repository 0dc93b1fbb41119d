"""Train with and without a CUDA graph of the step on the pretended device.

    python graph_launches.py NAME ...

prints a JSON object: for each network of conf/model the kernels that a step of a full batch
starts and its waits, without and with a graph.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from network_stages import count_stages, num_launches, stage_report
from pretended_cuda import PretendedCuda

# isort: split
import torch
from small_networks import network_config, network_dataset

from qtorch.core.instantiate import init_instance_by_config


def measure_steps(name: str, gpu: PretendedCuda) -> dict[str, Any]:
    launches, waits = [], 0
    for mode, description in ((False, "off"), ("auto", "used")):
        config = network_config(name)
        config["batch"]["drop_last"] = True  # a smaller last batch is an ordinary step
        gpu.stages.clear()
        model = init_instance_by_config({**config, "cuda_graph": mode})
        model.fit(network_dataset(name))
        assert model.fit_report_["cuda_graph"] == description, model.fit_report_["cuda_graph"]
        stages = stage_report(gpu)
        launches.append(num_launches(stages, "train"))
        names = ("train", "train in the first epoch")
        waits += sum(sum(stages[stage]["waits"].values()) for stage in names)
    return {"launches": launches, "waits": waits}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with PretendedCuda() as device:
        count_stages(device)
        print(json.dumps({name: measure_steps(name, device) for name in sys.argv[1:]}))
