import sys

import numpy as np
import pytest
from sklearn import datasets

from polyspan import data
from polyspan.data import digits, photograph, python_reference
from polyspan.errors import MissingExtra


@pytest.mark.parametrize(("name", "scale"), [("digits", 16), ("iris", 1), ("wine", 1), ("breast_cancer", 1)])
def test_a_set_is_scikit_learns_in_float32_with_labels_from_zero(name, scale):
    X, y = getattr(data, name)()
    theirs = getattr(datasets, f"load_{name}")()
    np.testing.assert_allclose(X * scale, theirs.data, rtol=1e-6)
    np.testing.assert_array_equal(y, theirs.target)
    assert (X.dtype, y.dtype, y.min()) == (np.float32, np.int64, 0)


def test_pixels_of_digits_lie_between_nought_and_one_and_are_the_callers_own():
    X, _ = digits()
    assert (X.min(), X.max()) == (0.0, 1.0)
    X[:] = 7
    assert digits()[0].max() == 1.0


@pytest.mark.parametrize(("name", "colours"), [("cat", 3), ("camera", 0), ("rocket", 3)])
def test_a_photograph_is_scikit_images_in_float32(name, colours):
    images = pytest.importorskip("skimage.data")
    found = photograph(name)
    assert found.dtype == np.float32
    assert found.shape[2:] == ((colours,) if colours else ())
    np.testing.assert_allclose(found * 255, getattr(images, name)(), rtol=1e-6, atol=1e-5)


def test_a_picture_that_would_be_fetched_is_refused():
    with pytest.raises(ValueError, match=r"name must be one of .*got 'kidney'"):
        photograph("kidney")


def test_without_scikit_image_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(MissingExtra, match=r"polyspan\[images\]"):
        photograph()


def test_the_reference_is_what_help_shows_in_one_order():
    found = python_reference()
    assert found == python_reference()
    assert len(found) > 300_000
    assert found.index("Assignment statements\n***") < found.index('The "while" statement\n***')
