"""Results as tables and plots: `nemo-engine bench report FOLDER`."""

from nemo_engine.benchmarks.report.command import add_arguments, run

__all__ = ["add_arguments", "run"]
