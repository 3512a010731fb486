"""Recipes: controls composed with a paper's defaults, and the loops around a pipeline (inversion, search, training).

One file per recipe. A recipe may use `attnctl` and `attnctl.processors`; nothing there knows of a recipe.
"""

from .astar import AStarPipeline
from .compose import PrimeComposer
from .compositions import Composition
from .head_hunter import HeadHunter
from .personalizer import Personalizer

__all__ = ["AStarPipeline", "Composition", "HeadHunter", "Personalizer", "PrimeComposer"]
