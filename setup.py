"""Finds the packages; all other settings are in pyproject.toml."""

from setuptools import find_packages, setup

# The recipes are at the top of the repository and are installed inside the package.
setup(
    packages=[*find_packages(include=["configuration_mmcot*", "modeling_mmcot*", "mmcot*"]), "mmcot.configs"],
    package_dir={"mmcot.configs": "configs"},
)
