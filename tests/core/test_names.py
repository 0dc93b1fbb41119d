"""Import paths: the public names that are stored, and the older names that are still read."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import pkgutil

import pytest
import torch

import qtorch
from qtorch.backtest.strategy import Strategy
from qtorch.core.configured import Configured
from qtorch.core.errors import ConfigError, TrustError
from qtorch.core.instantiate import init_instance_by_config
from qtorch.core.names import current_name, import_object, import_path
from qtorch.core.session import session_context
from qtorch.core.trust import StoredText, as_stored_text, check_config_trust, load_pickle, locate
from qtorch.data import DataHandlerLP, SyntheticSource, TSDatasetH
from qtorch.data.processor import RobustZScoreNorm
from qtorch.nn import MLP

# Under these names older versions stored the classes; their modules have moved since.
OLD_NAMES = {
    "qtorch.data.window_dataset.TSDatasetH": TSDatasetH,
    "qtorch.data.handler.DataHandlerLP": DataHandlerLP,  # a folder has this name today
    "qtorch.data.processor.normalization.RobustZScoreNorm": RobustZScoreNorm,
    "qtorch.nn.some.folder.mlp.MLP": MLP,
}


class Part:
    def __init__(self, layer: object = None) -> None:
        self.layer = layer


def test_import_path_is_the_public_name():
    assert import_path(TSDatasetH) == "qtorch.data.TSDatasetH"
    assert import_path(SyntheticSource) == "qtorch.data.SyntheticSource"  # also in data.source
    assert import_path(RobustZScoreNorm) == "qtorch.data.processor.RobustZScoreNorm"
    assert import_path(Configured) == "qtorch.core.configured.Configured"  # has no public name
    assert import_path(Part) == f"{__name__}.Part"
    assert import_path(torch.optim.Adam) == "torch.optim.adam.Adam"


def test_every_public_name_leads_back_to_its_object():
    for module in pkgutil.walk_packages(qtorch.__path__, "qtorch."):
        package = importlib.import_module(module.name) if module.ispkg else None
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name)
            if isinstance(value, type):
                assert locate(import_path(value)) is value


@pytest.mark.parametrize(("name", "cls"), OLD_NAMES.items())
def test_name_of_a_module_that_is_gone_is_found_among_the_public_names(name, cls):
    module, _, attribute = name.rpartition(".")
    assert locate(name) is locate(attribute, module) is cls
    assert current_name(name) == import_path(cls)
    assert locate(StoredText(name)) is cls
    check_config_trust(as_stored_text({"class": attribute, "module_path": module}))
    assert load_pickle(f"c{module}\n{attribute}\n.".encode(), is_trusted=True) is cls
    assert current_name(import_path(cls)) == import_path(cls)


def test_old_name_in_a_nested_configuration_is_found():
    network = {"_target_": "qtorch.nn.gone.MLP", "d_feat": 3, "layers": [4]}
    config = {"_target_": f"{__name__}.Part", "layer": network}
    assert isinstance(init_instance_by_config(config).layer, MLP)
    assert isinstance(init_instance_by_config(as_stored_text(network)), MLP)


def test_name_that_no_package_exports_raises_the_usual_error():
    with pytest.raises(ConfigError, match=r"unknown name in qtorch\.data 'gone'"):
        locate("qtorch.data.gone.Missing")
    with pytest.raises(ConfigError, match="no module named 'elsewhere'"):
        locate("elsewhere.gone.TSDatasetH")
    assert current_name("qtorch.model.gone.TSDatasetH") == "qtorch.model.gone.TSDatasetH"


def test_trust_rule_holds_for_the_object_that_an_old_name_stands_for():
    name = "qtorch.data.gone.write_qlib"  # a function, exported by qtorch.data
    for packages in ((), ("qtorch.data.gone",)):
        with session_context(trusted=packages), pytest.raises(TrustError, match="not of a type"):
            locate(StoredText(name))
    with session_context(trusted=("qtorch",)):
        locate(StoredText(name))


def test_pickle_names_the_class_by_its_module():
    assert load_pickle(pickle.dumps(Strategy), is_trusted=True) is Strategy


@pytest.mark.skipif(importlib.util.find_spec("qlib") is not None, reason="Qlib is installed")
def test_a_module_that_imports_qlib_without_qlib_says_how_to_import_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = "from qlib.data.dataset.loader import QlibDataLoader\n"
    for name in ("handler_of_qlib_file", "handler_of_qlib_module"):
        (tmp_path / f"{name}.py").write_text(text)
    for name in ("handler_of_qlib_file.py", "handler_of_qlib_module"):
        with pytest.raises(ConfigError, match=rf"{name}' imports 'qlib'.*qtorch\.compat\.qlib"):
            import_object("QlibDataLoader", name)
    with pytest.raises(ConfigError, match="no module named 'qlib'"):
        import_object("qlib.data.dataset.loader.QlibDataLoader")
