"""What is measured: losses, information coefficients, risk."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.metrics.ic import DailyIC as DailyIC
    from qtorch.metrics.ic import ICMeter as ICMeter
    from qtorch.metrics.ic import daily_ic as daily_ic
    from qtorch.metrics.loss import MAE as MAE
    from qtorch.metrics.loss import MSE as MSE
    from qtorch.metrics.loss import Huber as Huber
    from qtorch.metrics.loss import Loss as Loss
    from qtorch.metrics.risk import indicator_analysis as indicator_analysis
    from qtorch.metrics.risk import risk_analysis as risk_analysis
    from qtorch.metrics.signal import calc_ic as calc_ic
    from qtorch.metrics.signal import calc_long_short_prec as calc_long_short_prec
    from qtorch.metrics.signal import calc_long_short_return as calc_long_short_return

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "DailyIC": "qtorch.metrics.ic",
        "Huber": "qtorch.metrics.loss",
        "ICMeter": "qtorch.metrics.ic",
        "Loss": "qtorch.metrics.loss",
        "MAE": "qtorch.metrics.loss",
        "MSE": "qtorch.metrics.loss",
        "calc_ic": "qtorch.metrics.signal",
        "calc_long_short_prec": "qtorch.metrics.signal",
        "calc_long_short_return": "qtorch.metrics.signal",
        "daily_ic": "qtorch.metrics.ic",
        "indicator_analysis": "qtorch.metrics.risk",
        "risk_analysis": "qtorch.metrics.risk",
    },
)
