"""A hook that a user's class defines under a former name is an error, not silently ignored."""

from __future__ import annotations

import pytest
from pytorch_lightning import LightningModule

from qtorch.backtest import LongShortStrategy, Orders, Strategy
from qtorch.backtest.simulate import simulate
from qtorch.core.errors import ConfigError
from qtorch.data.processor import Processor
from qtorch.model.loop.module import ScoreModule
from qtorch.model.loop.rank_group import RankGroup
from qtorch.model.loop.user_module import UserModuleRescaler


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [
        (Strategy, "short", "allow_short"),
        (LongShortStrategy, "short", "allow_short"),
        (Processor, "mends_infinite", "replaces_infinite"),
        (Processor, "selects", "output_columns"),
        (Processor, "fitted_state", "get_fitted_state"),
        (Processor, "load_fitted", "load_fitted_state"),
        (ScoreModule, "undivided", "single_device_reason"),
        (ScoreModule, "learnt", "trainable_parameters"),
        (ScoreModule, "further_optimizers", "extra_optimizers"),
    ],
)
def test_classes_with_a_former_name_are_refused(base, old, new):
    message = rf"test_former_names\.Own defines '{old}', which has no effect.* is '{new}' now"
    with pytest.raises(ConfigError, match=message):
        type("Own", (base,), {old: True, "__module__": __name__})
    assert hasattr(base, new)
    type("Own", (base,), {new: getattr(base, new)})


class ShortByArgument(Strategy):
    def __init__(self, short):
        super().__init__()
        self.short = short

    def decide(self, context):
        return Orders.empty()


def test_a_former_name_set_in_the_constructor_is_refused():
    with pytest.raises(ConfigError, match=r"defines 'short'.* is 'allow_short' now"):
        simulate(None, None, ShortByArgument(True), None, None)


def test_an_argument_that_happens_to_be_called_short_is_allowed():
    with pytest.raises(AttributeError, match="first"):  # the simulation begins
        simulate(None, None, ShortByArgument(5), None, None)


def test_a_user_module_with_a_former_name_is_refused():
    module = type("OwnModule", (LightningModule,), {"weight_of": lambda self, batch: 1})()
    with pytest.raises(ConfigError, match=r"defines 'weight_of'.* is 'batch_weight' now"):
        UserModuleRescaler(RankGroup()).setup(None, module, "fit")
