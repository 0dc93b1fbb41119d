"""Backtesting: turn scores into orders, fills and account values, one bar after another."""

from typing import TYPE_CHECKING

from qtorch.core.lazy import lazy_names

if TYPE_CHECKING:
    from qtorch.backtest.account import Orders as Orders
    from qtorch.backtest.enhanced_indexing import (
        EnhancedIndexingStrategy as EnhancedIndexingStrategy,
    )
    from qtorch.backtest.exchange import Exchange as Exchange
    from qtorch.backtest.order import Order as Order
    from qtorch.backtest.order import OrderDir as OrderDir
    from qtorch.backtest.positions import Position as Position
    from qtorch.backtest.positions import Positions as Positions
    from qtorch.backtest.qlib_form import backtest_daily as backtest_daily
    from qtorch.backtest.result import BacktestResult as BacktestResult
    from qtorch.backtest.run import SimulatorExecutor as SimulatorExecutor
    from qtorch.backtest.run import backtest as backtest
    from qtorch.backtest.strategy import LongShortStrategy as LongShortStrategy
    from qtorch.backtest.strategy import SoftTopkStrategy as SoftTopkStrategy
    from qtorch.backtest.strategy import StepContext as StepContext
    from qtorch.backtest.strategy import Strategy as Strategy
    from qtorch.backtest.strategy import TopkDropoutStrategy as TopkDropoutStrategy
    from qtorch.backtest.strategy import WeightStrategy as WeightStrategy
    from qtorch.backtest.strategy import WeightStrategyBase as WeightStrategyBase
    from qtorch.metrics.risk import risk_analysis as risk_analysis

__getattr__, __dir__ = lazy_names(__name__, __file__)
