import jaxtyping
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintParamViolation

from polyspan.io import read_array
from polyspan.linalg import complete_basis


def test_shapes_in_signatures_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError, match="complete_basis"):
        complete_basis(np.ones(3))


def test_plain_types_are_checked_in_tests():
    with pytest.raises(BeartypeCallHintParamViolation):
        read_array("x.npy", mmap=3)
