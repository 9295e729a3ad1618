import pytest
from matplotlib.figure import Figure

from polyspan.errors import UnreadableFile
from polyspan.io import picture_path, write_picture


def drawn(value=1.0):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, value])
    return figure


@pytest.mark.parametrize(("suffix", "head"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_a_picture_is_of_the_kind_its_name_says_and_says_nothing_of_the_hour(tmp_path, suffix, head):
    import matplotlib as mpl

    written = []
    for name in ("a", "b"):
        with mpl.rc_context({"svg.hashsalt": "polyspan"}):
            path = write_picture(drawn(), tmp_path / f"{name}{suffix}")
        written.append(path.read_bytes())
    assert written[0].startswith(head)
    assert written[0] == written[1]
    assert write_picture(drawn(2.0), tmp_path / f"c{suffix}", dpi=50).read_bytes() != written[0]


def test_another_suffix_or_place_leaves_what_is_there(tmp_path):
    (tmp_path / "a.gif").write_text("mine")
    for ask in (picture_path, lambda path: write_picture(drawn(), path)):
        with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf, got .*a.gif"):
            ask(tmp_path / "a.gif")
    assert (tmp_path / "a.gif").read_text() == "mine"
    with pytest.raises(UnreadableFile, match="none"):
        write_picture(drawn(), tmp_path / "none" / "a.svg")
