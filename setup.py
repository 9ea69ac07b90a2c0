"""The wheel's packages: `tokalign`, and inside it the top-level folders of recipes and launch configurations.

Everything else is in pyproject.toml, which can list packages or find them, but not both.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["tokalign*"]), "tokalign.recipes", "tokalign.accelerate_configs"])
