"""The experiments of Du, Li and Mordatch (NeurIPS 2020), done again: `ebmfast evaluate NAME` makes a table and a picture."""
from .conditions import Law, draw_conditions
from .protocol import Models, Settings
from .registry import EXPERIMENTS, Experiment, Row
from .tree import All, Any, Count, Is, Not

__all__ = [
    "EXPERIMENTS", "All", "Any", "Count", "Experiment", "Is", "Law", "Models", "Not", "Row", "Settings", "draw_conditions",
]
