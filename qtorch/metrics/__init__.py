"""Losses, information coefficients, signal analysis and risk metrics."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.metrics.curve import cumulative_return as cumulative_return
    from qtorch.metrics.curve import drawdown as drawdown
    from qtorch.metrics.decay import ic_decay as ic_decay
    from qtorch.metrics.decay import score_autocorrelation as score_autocorrelation
    from qtorch.metrics.holdings import concentration as concentration
    from qtorch.metrics.ic import DailyIC as DailyIC
    from qtorch.metrics.ic import ICMeter as ICMeter
    from qtorch.metrics.ic import daily_ic as daily_ic
    from qtorch.metrics.loss import MAE as MAE
    from qtorch.metrics.loss import MSE as MSE
    from qtorch.metrics.loss import Huber as Huber
    from qtorch.metrics.loss import Loss as Loss
    from qtorch.metrics.paired import PairedTest as PairedTest
    from qtorch.metrics.paired import holm as holm
    from qtorch.metrics.paired import paired_test as paired_test
    from qtorch.metrics.quantile import quantile_returns as quantile_returns
    from qtorch.metrics.risk import indicator_analysis as indicator_analysis
    from qtorch.metrics.risk import risk_analysis as risk_analysis
    from qtorch.metrics.sharpe import DeflatedSharpe as DeflatedSharpe
    from qtorch.metrics.sharpe import deflated_sharpe as deflated_sharpe
    from qtorch.metrics.sharpe import expected_best_sharpe as expected_best_sharpe
    from qtorch.metrics.sharpe import probabilistic_sharpe as probabilistic_sharpe
    from qtorch.metrics.signal import calc_ic as calc_ic
    from qtorch.metrics.signal import calc_long_short_prec as calc_long_short_prec
    from qtorch.metrics.signal import calc_long_short_return as calc_long_short_return

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "DailyIC": "qtorch.metrics.ic",
        "DeflatedSharpe": "qtorch.metrics.sharpe",
        "Huber": "qtorch.metrics.loss",
        "ICMeter": "qtorch.metrics.ic",
        "Loss": "qtorch.metrics.loss",
        "MAE": "qtorch.metrics.loss",
        "MSE": "qtorch.metrics.loss",
        "PairedTest": "qtorch.metrics.paired",
        "calc_ic": "qtorch.metrics.signal",
        "calc_long_short_prec": "qtorch.metrics.signal",
        "calc_long_short_return": "qtorch.metrics.signal",
        "concentration": "qtorch.metrics.holdings",
        "cumulative_return": "qtorch.metrics.curve",
        "daily_ic": "qtorch.metrics.ic",
        "indicator_analysis": "qtorch.metrics.risk",
        "deflated_sharpe": "qtorch.metrics.sharpe",
        "drawdown": "qtorch.metrics.curve",
        "expected_best_sharpe": "qtorch.metrics.sharpe",
        "holm": "qtorch.metrics.paired",
        "ic_decay": "qtorch.metrics.decay",
        "paired_test": "qtorch.metrics.paired",
        "probabilistic_sharpe": "qtorch.metrics.sharpe",
        "quantile_returns": "qtorch.metrics.quantile",
        "risk_analysis": "qtorch.metrics.risk",
        "score_autocorrelation": "qtorch.metrics.decay",
    },
)
