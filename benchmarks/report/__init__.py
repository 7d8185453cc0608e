"""Results as tables for the README, and as plots: `nemo-engine bench report FOLDER`."""

from nemo_engine.benchmarks.report.command import add_arguments, run

__all__ = ["add_arguments", "run"]
