import numpy as np
import pytest

from polyspan.cluster.image_arrays import images_of
from polyspan.cluster.image_folder import ImageFolder
from polyspan.errors import CorruptFile, WrongContent

GREY = np.random.default_rng(0).random((6, 5, 7))
COLOUR = np.random.default_rng(1).random((6, 3, 5, 7))


@pytest.mark.parametrize(
    ("array", "options", "expected", "n_said"),
    [
        (GREY, {}, GREY, 0),
        (COLOUR, {}, COLOUR, 0),
        (COLOUR.transpose(0, 2, 3, 1), {}, COLOUR, 1),
        (GREY[..., None], {}, GREY[:, None], 1),
        (GREY.reshape(6, 35), {"shape": (5, 7)}, GREY, 1),
        (GREY.transpose(0, 2, 1).reshape(6, 35), {"shape": (5, 7), "pixel_order": "column"}, GREY, 1),
        (GREY.reshape(6, 35).T, {"shape": (5, 7)}, GREY, 2),
        (GREY[:, :, :5].reshape(6, 25), {}, GREY[:, :, :5], 1),
        (GREY[:, :, :5].reshape(6, 25).T, {"n_labels": 6}, GREY[:, :, :5], 2),
        (GREY.transpose(1, 2, 0), {"n_labels": 6}, GREY, 1),
        (COLOUR.transpose(2, 3, 1, 0), {"n_labels": 6}, COLOUR, 2),
        (COLOUR[..., :3], {"channels": "first"}, COLOUR[..., :3], 0),
        (COLOUR[..., :3].transpose(0, 2, 3, 1), {"channels": "last"}, COLOUR[..., :3], 1),
    ],
)  # fmt: skip
def test_every_layout_gives_the_same_images_and_says_what_was_done(array, options, expected, n_said):
    found, said = images_of(array, **options)
    np.testing.assert_array_equal(found, expected)
    assert len(said) == n_said


def test_matlab_flattens_as_fortran_does():
    rows = np.stack([image.ravel(order="F") for image in GREY])
    np.testing.assert_array_equal(images_of(rows, shape=(5, 7), pixel_order="column")[0], GREY)


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (COLOUR[..., :3], {}, "first or last: both"),
        (np.ones((6, 5, 5, 7)), {}, "first or last: neither"),
        (np.ones((6, 35)), {}, "shape must be given for images in rows of 35 pixels"),
        (np.ones((6, 35)), {"shape": (5, 8)}, "height and width of 35 pixels, got 5 by 8"),
        (GREY, {"shape": (5, 7)}, "shape must go with flattened images"),
        (GREY, {"channels": "last"}, "channels must go with four axes"),
        (GREY, {"n_labels": 9}, "one label an image, got 9 labels"),
        (GREY[:0], {}, "at least one, of at least one pixel"),
        (np.ones(6), {}, r"images must be \(n, h, w\)"),
    ],
)  # fmt: skip
def test_what_has_no_one_answer_is_refused(array, options, message):
    with pytest.raises(ValueError, match=message):
        images_of(array, **options)


def test_deep_turned_and_transparent_pictures_look_as_a_viewer_shows_them(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4, :, 3] = 255
    Image.fromarray(clear).save(tmp_path / "b.png")
    turned = Image.fromarray((ramp // 257).astype(np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 3
    turned.save(tmp_path / "c.png", exif=exif)
    grey = ImageFolder(tmp_path, (8, 8))
    np.testing.assert_allclose(grey[0], ramp / 65535, atol=1e-6)
    np.testing.assert_array_equal(grey[1], np.repeat([0.0, 1.0], 4)[:, None] * np.ones(8))
    np.testing.assert_allclose(grey[2], (ramp // 257)[::-1, ::-1] / 255, atol=1e-6)
    colour = ImageFolder(tmp_path, (3, 8, 8))
    for i in range(3):
        np.testing.assert_allclose(colour[i], np.repeat(grey[i][None], 3, axis=0), atol=1e-6)
    assert grey.sizes == {(8, 8)}


def test_pictures_that_are_none_are_named(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    (tmp_path / "b.png").write_bytes(b"no picture")
    folder = ImageFolder(tmp_path, (4, 4))
    with pytest.raises(WrongContent, match=r"a\.tif: found pixels that are floats"):
        folder[0]
    with pytest.raises(CorruptFile, match=r"b\.png: found bytes of no known kind of picture"):
        folder[1]
    (tmp_path / "deep" / "inner").mkdir(parents=True)
    with pytest.raises(ValueError, match="its 1 folders, such as inner, are not looked into"):
        ImageFolder(tmp_path / "deep", (4, 4))
    with pytest.raises(ValueError, match="image_shape must be"):
        ImageFolder(tmp_path, (0, 4))
