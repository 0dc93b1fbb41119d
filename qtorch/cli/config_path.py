"""Locate the Hydra configuration that is shipped with qtorch."""

from __future__ import annotations

from pathlib import Path

ROOT_CONFIG = "train"


def config_path() -> Path:
    """Return the folder of the shipped Hydra config groups.

    A wheel contains it inside the package (`qtorch/conf`); in an editable install it is beside the
    package, at the root of the working tree. Hydra adds a user's `--config-dir` itself.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "conf", package.parent / "conf")
    for folder in candidates:
        if (folder / f"{ROOT_CONFIG}.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"cannot find qtorch's configuration ({ROOT_CONFIG}.yaml) in "
        f"{' or '.join(map(str, candidates))}: the installation is damaged, "
        "reinstall qtorch."
    )
