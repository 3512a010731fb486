"""Methods: one file per paper, its maths as plain functions on tensors and its `Control`.

A method knows the engine (`attnctl`), no model family and no pipeline class. `Control` is here for those who write one.
"""

from attnctl.engine.control import Control
from attnctl.maps.recorder import TokenMaps

from .astar import AStar
from .binding import Binding
from .calibrate import Calibrate
from .couple import Couple
from .dense_regions import DenseRegions
from .excitation import Excitation
from .lora_regions import LoraRegions
from .nag import Nag
from .perturb import Perturb
from .perturb_named import Pag, Seg, Slg, Tpg
from .placement import Placement
from .regions import Isolation, Regions
from .retention import Retention
from .segregation import Segregation

__all__ = [
    "AStar", "Binding", "Calibrate", "Control", "Couple", "DenseRegions", "Excitation", "Isolation", "LoraRegions",
    "Nag", "Pag", "Perturb", "Placement", "Regions", "Retention", "Seg", "Segregation", "Slg", "TokenMaps", "Tpg",
]  # fmt: skip
