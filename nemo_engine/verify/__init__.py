"""Measures how far FP8 is from the reference: logits, KL divergence, top-1 agreement, perplexity, and retrieval at
growing context.
"""

from nemo_engine.verify.measure import Limits, Measured, verify
from nemo_engine.verify.report import as_json, plot, report

__all__ = ["Limits", "Measured", "as_json", "plot", "report", "verify"]
