import pytest

from polyspan.errors import UnreadableFile
from polyspan.run import user_folder


def test_a_folder_is_made_where_the_user_said(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYSPAN_HOME", str(tmp_path / "mine"))
    folder = user_folder("evidence", "today")
    assert folder == tmp_path / "mine" / "evidence" / "today"
    assert folder.is_dir()
    assert user_folder("evidence", "today") == folder


def test_without_a_word_it_is_the_platforms_place_for_user_data(tmp_path, monkeypatch):
    monkeypatch.delenv("POLYSPAN_HOME", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert user_folder() == tmp_path / "polyspan"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_folder("journals") == tmp_path / "home" / ".local" / "share" / "polyspan" / "journals"


@pytest.mark.parametrize("parts", [("..", "x"), ("/etc",), ("a/../../b",)])
def test_a_part_that_leads_out_is_refused(tmp_path, monkeypatch, parts):
    monkeypatch.setenv("POLYSPAN_HOME", str(tmp_path / "mine"))
    with pytest.raises(ValueError, match="parts must stay inside"):
        user_folder(*parts)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_named(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("")
    monkeypatch.setenv("POLYSPAN_HOME", str(tmp_path / "mine"))
    with pytest.raises(UnreadableFile, match="mine"):
        user_folder("evidence")
