from .grassmann_classifier import GrassmannClassifier as GrassmannClassifier
from .grassmann_head import GrassmannHead as GrassmannHead
from .grassmann_head import replace_head as replace_head
from .grassmann_head import with_grassmann_head as with_grassmann_head
from .grassmann_optim import GrassmannParameter as GrassmannParameter
from .grassmann_optim import RiemannianAdam as RiemannianAdam
from .grassmann_optim import RiemannianSGD as RiemannianSGD
from .grassmann_optim import grassmann_groups as grassmann_groups
