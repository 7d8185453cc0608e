"""A discrete-event simulation: the real scheduler on a virtual clock, with a cost model in the runner's place.

Must not know torch.
"""

from nemo_engine.simulator.cost import CostModel, Measurement
from nemo_engine.simulator.fleet import Changes, Load
from nemo_engine.simulator.replica import EngineShape
from nemo_engine.simulator.results import Results
from nemo_engine.simulator.routing import ROUTINGS
from nemo_engine.simulator.run import Setting, simulate

__all__ = ["ROUTINGS", "Changes", "CostModel", "EngineShape", "Load", "Measurement", "Results", "Setting", "simulate"]
