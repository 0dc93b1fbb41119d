"""Download the wheels that a GPU machine without network lacks: fetch_wheels.py FOLDER [3.12]

These are the installed versions of the project's requirements and of what they require, without
torch and pytorch-lightning, which that machine has.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THERE = {"torch", "pytorch-lightning", "triton", "numpy"}
TEST_TOOLS = ("pytest", "iniconfig", "pluggy")
GLIBC_VERSIONS = (17, 24, 27, 28, 31, 34)


def find_requirements(names: list[str]) -> dict[str, str]:
    """Return the installed version of each package, and of those that it requires."""
    versions: dict[str, str] = {}
    while names:
        name = names.pop().lower().replace("_", "-")
        if name in versions or name in THERE or name.startswith("nvidia-"):
            continue
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # only for another platform
            continue
        names += [package_name(r) for r in requires(name) or () if "extra ==" not in r]
    return versions


def package_name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def main(folder: str, python_version: str = "3.12") -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [package_name(text) for text in project["dependencies"]]
    versions = find_requirements([*names, *TEST_TOOLS])
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_VERSIONS]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python_version]
    options += [option for platform in platforms for option in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip"]
    for name, number in sorted(versions.items()):
        requirement = f"{name}=={number}"
        process = subprocess.run(
            [*pip, "download", "-q", *options, "-d", folder, requirement], check=False
        )
        if process.returncode:  # no wheel is published: build one, for any platform
            subprocess.run(
                [*pip, "wheel", "-q", "--no-deps", "-w", folder, requirement], check=True
            )
    print(f"{len(versions)} wheels in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
