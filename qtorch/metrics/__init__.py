"""Losses, information coefficients, signal analysis and risk metrics."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.metrics.ic import DailyIC as DailyIC
    from qtorch.metrics.ic import ICMeter as ICMeter
    from qtorch.metrics.ic import daily_ic as daily_ic
    from qtorch.metrics.loss import MAE as MAE
    from qtorch.metrics.loss import MSE as MSE
    from qtorch.metrics.loss import BaseLoss as BaseLoss
    from qtorch.metrics.loss import DayLoss as DayLoss
    from qtorch.metrics.loss import Huber as Huber
    from qtorch.metrics.loss import Loss as Loss
    from qtorch.metrics.portfolio import concentration as concentration
    from qtorch.metrics.portfolio import indicator_analysis as indicator_analysis
    from qtorch.metrics.risk import cumulative_return as cumulative_return
    from qtorch.metrics.risk import drawdown as drawdown
    from qtorch.metrics.risk import risk_analysis as risk_analysis
    from qtorch.metrics.selection import Overfitting as Overfitting
    from qtorch.metrics.selection import SelectionTest as SelectionTest
    from qtorch.metrics.selection import SuperiorityTest as SuperiorityTest
    from qtorch.metrics.selection import assess_selection as assess_selection
    from qtorch.metrics.selection import overfitting_probability as overfitting_probability
    from qtorch.metrics.selection import superiority_test as superiority_test
    from qtorch.metrics.signal import calc_ic as calc_ic
    from qtorch.metrics.signal import calc_long_short_prec as calc_long_short_prec
    from qtorch.metrics.signal import calc_long_short_return as calc_long_short_return
    from qtorch.metrics.signal import ic_decay as ic_decay
    from qtorch.metrics.signal import quantile_returns as quantile_returns
    from qtorch.metrics.signal import score_autocorrelation as score_autocorrelation
    from qtorch.metrics.significance import DeflatedSharpe as DeflatedSharpe
    from qtorch.metrics.significance import PairedTest as PairedTest
    from qtorch.metrics.significance import deflated_sharpe as deflated_sharpe
    from qtorch.metrics.significance import expected_best_sharpe as expected_best_sharpe
    from qtorch.metrics.significance import holm as holm
    from qtorch.metrics.significance import paired_test as paired_test
    from qtorch.metrics.significance import probabilistic_sharpe as probabilistic_sharpe

__getattr__, __dir__ = lazy_names(__name__, __file__)
