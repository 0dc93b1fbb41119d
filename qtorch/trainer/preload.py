"""What trainings import. A fork server imports this module, so that its children start quickly."""

from __future__ import annotations

import logging
import sys
from importlib import import_module

log = logging.getLogger(__name__)

MODULES = (
    "qtorch.tracking.mlflow_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.tracing.processor.base_mlflow",
    "mlflow.utils.name_utils",
    "sqlalchemy.dialects.sqlite",
    "qtorch.model.lightning_model",
    "qtorch.model.fit",
    "qtorch.data.handler.alpha",
    "qtorch.data.dataset.dataset",
    "qtorch.nn.recurrent",
    "qtorch.record.signal",
    "qtorch.record.report.signal_charts",
    "qtorch.trainer.run",
    "torch.optim",
    "torch._dynamo",  # imported in an optimizer's first step
    "torch.utils.serialization",
    "torch.profiler._cupti_monitor",
    "pytorch_lightning.callbacks",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pyarrow.pandas_compat",
    "safetensors.torch",
    "rich.progress",
)


def import_modules() -> None:
    """Import the modules, except those that fail; their memory pages are then shared."""
    for name in MODULES:
        try:
            import_module(name)
        except Exception as error:  # not installed, or not in this version of the library
            log.debug("cannot import %s: %s", name, error)
    torch = sys.modules.get("torch")
    # A forked child cannot use CUDA if its parent has a CUDA context.
    assert torch is None or not torch.cuda.is_initialized()


import_modules()
