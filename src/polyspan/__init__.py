"""Published systems about subspaces and structured representations, as working software."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
