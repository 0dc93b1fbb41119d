"""qtorch: deep learning for stock research on PyTorch Lightning, Hydra and MLflow."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.core.instantiate import init_instance_by_config as init_instance_by_config
    from qtorch.core.runtime import init as init
    from qtorch.tracking.manager import R as R

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_names(__name__, __file__)
