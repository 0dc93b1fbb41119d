"""Risk of returns: the part of `qtorch.metrics.portfolio` that needs no portfolio."""

from qtorch.metrics.portfolio import cumulative_return as cumulative_return
from qtorch.metrics.portfolio import drawdown as drawdown
from qtorch.metrics.portfolio import risk_analysis as risk_analysis
