from .attributed_graph import S2CAG as S2CAG
from .attributed_graph import ModularityS2CAG as ModularityS2CAG
from .attributed_graph import OrderDecayChoice as OrderDecayChoice
from .attributed_graph import OrderDecayRow as OrderDecayRow
from .attributed_graph import select_order_decay as select_order_decay
from .attributed_graph import smoothed_attributes as smoothed_attributes
