"""What pyproject.toml cannot say: ``kernels/`` lies beside the package in the tree and inside it when installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nemo_engine", "nemo_engine.*"]), "nemo_engine.kernels"],
    package_dir={"nemo_engine": "nemo_engine", "nemo_engine.kernels": "kernels"},
)
