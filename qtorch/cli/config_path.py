"""Where the shipped configuration lies: one answer for a wheel and for a working tree."""

from __future__ import annotations

from pathlib import Path

ROOT_CONFIG = "train"


def config_path() -> Path:
    """The folder of the shipped Hydra groups.

    A wheel carries it inside the package (`qtorch/conf`); in an editable install it lies beside
    the package, at the root of the working tree. A user's `--config-dir` is added by Hydra.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "conf", package.parent / "conf")
    for folder in candidates:
        if (folder / f"{ROOT_CONFIG}.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"qtorch's own configuration ({ROOT_CONFIG}.yaml) was looked for in "
        f"{' and '.join(map(str, candidates))} and is in neither: the installation is damaged, "
        "install qtorch again."
    )
