import time
from html.parser import HTMLParser
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree as ET

import pytest

from polyspan.catalog import entries
from polyspan.errors import UnreadableFile, WrongContent
from polyspan.gallery import build_gallery, project_evidence
from polyspan.gallery._words import (
    byte_size,
    duration,
    number_format,
    plain_number,
    python_markup,
    shown_authors,
    signed,
)
from polyspan.gallery.build import code_url

ENTRIES = entries()
ATOM = "{http://www.w3.org/2005/Atom}"
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """Walk a page: every element closed in order, ids distinct, and what it refers to."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.resources, self.words, self.tags = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        facts = dict(attrs)
        assert len(facts) == len(attrs), f"an attribute twice in <{tag}>"
        assert not any(name.startswith("on") or name == "style" for name in facts), f"inline code in <{tag}>"
        self.tags.append(tag)
        self.ids += [facts["id"]] if "id" in facts else []
        if tag == "a":
            self.links.append(facts["href"])
        elif "href" in facts or "src" in facts:
            self.resources.append(facts.get("href") or facts["src"])

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p.read_text("utf-8")) for p in sorted(site.rglob("*.html"))}


def test_there_is_a_page_for_each_system_and_family_and_all_are_well_formed(pages):
    wanted = {f"systems/{e.slug}.html" for e in ENTRIES} | {f"families/{e.family}.html" for e in ENTRIES}
    assert pages.keys() == wanted | {"index.html", "verdicts.html"}
    for name, page in pages.items():
        assert not page.open, f"{name} leaves {page.open} open"
        assert len(set(page.ids)) == len(page.ids), f"{name} has an id twice"
        assert page.tags.count("h1") == page.tags.count("main") == page.tags.count("title") - page.tags.count("desc")


def test_every_internal_link_and_resource_leads_to_something(site, pages):
    for name, page in pages.items():
        for address in page.links + page.resources:
            parts = urlsplit(address)
            if parts.scheme:
                assert address in page.links, f"{name} loads {address} from outside"
                assert parts.scheme == "https"
                continue
            assert not parts.netloc
            target = PurePosixPath(name).parent / unquote(parts.path) if parts.path else PurePosixPath(name)
            assert (site / target).is_file(), f"{name} links to {address}"
            if parts.fragment:
                assert parts.fragment in Page((site / target).read_text("utf-8")).ids, f"{name} links to {address}"


def test_static_files_refer_to_nothing_outside(site):
    for path in (site / "static").iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        for forbidden in ("http:", "https:", "url(", "@import", "eval(", "innerHTML"):
            assert forbidden not in text, f"{path.name} has {forbidden}"


def test_the_index_shows_the_newest_paper_first_and_a_diagram_for_each_measured_system(site, pages):
    page = pages["index.html"]
    titles = [e.title for e in ENTRIES]
    places = [page.text.index(" ".join(title.split())) for title in titles]
    assert places == sorted(places)
    text = (site / "index.html").read_text("utf-8")
    assert text.count('class="chart"') == 4
    assert text.count('<article aria-labelledby="card-') == len(ENTRIES)


def test_the_projects_hardest_level_speaks_and_the_users_run_stands_beside_it(site, pages):
    text = (site / "index.html").read_text("utf-8")
    card = text[text.index(f'id="card-{ENTRIES[0].slug}"') - 900 :].split("</li>")[0]
    assert "badge-open" in card.split("your run")[0]
    assert "badge-fails" in card.split("your run")[1]
    words = pages[f"systems/{ENTRIES[0].slug}.html"].text
    order = [words.index(part) for part in ("standard level", "quick level", "Your run: quick", "Your run: own data")]
    assert order == sorted(order)


def test_a_system_that_only_the_user_measured_says_whose_run_it_is(site, pages):
    text = (site / "index.html").read_text("utf-8")
    card = text[: text.index(f'id="card-{ENTRIES[3].slug}"')].rsplit("<li", 1)[1]
    assert "badge-holds" in card
    assert "your run" in card


def test_a_systems_page_holds_every_number_that_its_chart_draws(pages):
    words = pages[f"systems/{ENTRIES[0].slug}.html"].text
    for number in ("0.910", "0.890 to 0.930", "0.702", "0.680 to 0.730", "+0.200", "0.150 to 0.250", "+0.050"):
        assert number in words
    assert "5 seeds" in words
    for fact in ("some CPU", "8.0 GiB", "numpy 2.4.6", "2026-11-25 04:00:00 UTC", "3.10 s", "5.0 MiB", "margin 0.02"):
        assert fact in words


def test_planned_systems_say_so_and_offer_nothing_to_run(pages):
    planned = next(e for e in ENTRIES[4:] if e.status == "planned")
    page = pages[f"systems/{planned.slug}.html"]
    assert "Not built yet" in page.text
    assert f"https://arxiv.org/abs/{planned.arxiv}" in page.links
    assert "Measure it again" not in page.text
    assert "Use it" not in page.text


def test_working_systems_show_their_snippet_and_command(pages):
    for e in ENTRIES:
        if e.status == "working":
            shown = "".join(pages[f"systems/{e.slug}.html"].words)
            assert e.snippet.strip("\n") in shown
            assert e.command.strip() in shown


def test_verdicts_list_every_run(pages):
    words = pages["verdicts.html"].text
    assert "7 runs of 4 systems" in words
    assert words.count("fails, as it must") == 7 + 1  # the legend says it once


def test_the_feed_is_atom_with_stable_ids_and_absolute_links(tmp_path, folders, site):
    built = build_gallery(tmp_path / "a", evidence=folders, project=folders[0], base_url="https://example.org/gallery")
    feed, relative = (ET.fromstring((folder / "feed.xml").read_text("utf-8")) for folder in (built, site))
    found = feed.findall(f"{ATOM}entry")
    assert [x.findtext(f"{ATOM}title") for x in found] == [e.title for e in ENTRIES]
    ids = [x.findtext(f"{ATOM}id") for x in (feed, *found)]
    assert len(set(ids)) == len(ids)
    assert ids == [x.findtext(f"{ATOM}id") for x in (relative, *relative.findall(f"{ATOM}entry"))]
    for x in (feed, *found):
        assert x.findtext(f"{ATOM}updated").endswith("Z")
        link = x.find(f"{ATOM}link[@rel='alternate']").get("href")
        assert (built / link.removeprefix("https://example.org/gallery/")).is_file()
    assert feed.findtext(f"{ATOM}updated") == "2026-11-25T04:00:00Z"
    assert relative.find(f"{ATOM}link[@rel='self']").get("href") == "feed.xml"


def test_equal_input_gives_equal_bytes_within_three_seconds(tmp_path, folders):
    times = []

    def files(name):
        start = time.perf_counter()
        folder = build_gallery(tmp_path / name, evidence=folders, project=folders[0])
        times.append(time.perf_counter() - start)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    first = files("a")
    assert first == files("b")
    assert first == files("a")
    assert min(times) < 3


def test_a_folder_that_no_gallery_wrote_is_never_replaced(tmp_path, folders):
    (tmp_path / "mine").mkdir()
    note = tmp_path / "mine" / "note.txt"
    note.write_text("keep")
    with pytest.raises(WrongContent, match="mine"):
        build_gallery(tmp_path / "mine", evidence=[folders[0]])
    assert note.read_text() == "keep"
    built = build_gallery(tmp_path / "site", evidence=[folders[0]])
    (built / "CNAME").write_text("example.org")
    with pytest.raises(WrongContent, match="CNAME"):
        build_gallery(built, evidence=[folders[0]])
    (built / "CNAME").unlink()
    (built / "index.html").write_text("changed by hand")
    with pytest.raises(WrongContent, match="left as it was"):
        build_gallery(built, evidence=[folders[0]])


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path, folders):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert (build_gallery(tmp_path / "link", evidence=[folders[0]]) / "index.html").is_file()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "index.html").is_file()


def test_a_failed_build_leaves_the_gallery_that_was_there(tmp_path, folders, make_evidence, put):
    built = build_gallery(tmp_path / "site", evidence=[folders[0]])
    before = (built / "index.html").read_bytes()
    put(tmp_path / "bad", {"schema": 1, "slug": "x", "level": "quick"})
    with pytest.raises(WrongContent):
        build_gallery(built, evidence=[tmp_path / "bad"])
    assert (built / "index.html").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "site"]


def test_a_gallery_without_any_evidence_is_whole(tmp_path):
    (tmp_path / "none").mkdir()
    built = build_gallery(tmp_path / "site", evidence=[tmp_path / "none"])
    assert "No claim has been measured yet" in Page((built / "verdicts.html").read_text("utf-8")).text
    working = next(e for e in ENTRIES if e.status == "working")
    assert "unmeasured" in Page((built / "systems" / f"{working.slug}.html").read_text("utf-8")).text


def test_the_projects_own_evidence_is_found_in_a_clone(tmp_path, monkeypatch):
    assert project_evidence().name == "evidence"
    monkeypatch.setattr("polyspan.gallery.build.OWN_FOLDERS", (tmp_path / "gone",))
    with pytest.raises(UnreadableFile, match="gone"):
        project_evidence()


def test_several_folders_of_the_user_are_told_apart(tmp_path, make_evidence, put):
    slug = ENTRIES[0].slug
    for name in ("laptop", "server"):
        put(tmp_path / name / "evidence", make_evidence(slug))
    twice = [tmp_path / "laptop" / "evidence", tmp_path / "server" / "evidence", tmp_path / "laptop" / "evidence"]
    built = build_gallery(tmp_path / "site", evidence=twice)
    words = Page((built / "verdicts.html").read_text("utf-8")).text
    assert "your run in laptop/evidence" in words
    assert "your run in server/evidence" in words
    assert "2 runs of 1 system" in words


@pytest.mark.parametrize("base", ["javascript:alert(1)", "example.org", "ftp://example.org/", "https://e.org/?q=1"])
def test_a_base_that_is_no_web_address_is_refused(tmp_path, folders, base):
    with pytest.raises(ValueError, match="base_url"):
        build_gallery(tmp_path / "site", evidence=[folders[0]], base_url=base)


def test_numbers_are_written_with_the_digits_that_count():
    assert [number_format([0.91, 0.5])(x) for x in (0.91, -0.5, 0.0)] == ["0.910", "−0.500", "0.000"]
    assert number_format([0.0123])(0.0123) == "0.0123"
    assert number_format([123456.7])(123456.7) == "123,457"
    assert number_format([1.23e-9])(-1.23e-9) == "−1.23 × 10⁻⁹"
    assert number_format([])(0.0) == "0.000"
    assert (signed("0.1"), signed("−0.1")) == ("+0.1", "−0.1")
    assert (plain_number(0.02), plain_number(-1.0)) == ("0.02", "−1")
    assert [duration(s) for s in (0.5, 12.34, 75.0, 7260.0)] == ["0.50 s", "12.3 s", "1 min 15 s", "2 h 1 min"]
    assert [byte_size(b) for b in (0.0, 2048.0, 3.0 * 2**20, 2.0**31)] == [
        "not measured",
        "2.0 KiB",
        "3.0 MiB",
        "2.0 GiB",
    ]


def test_authors_are_named_as_far_as_they_are_known():
    assert shown_authors([], 5, 3) == "5 authors"
    assert shown_authors([], 1, 3) == "1 author"
    assert shown_authors(["A"], 1, 3) == "A"
    assert shown_authors(["A", "B"], 2, 3) == "A and B"
    assert shown_authors(["A", "B"], 6, 3) == "A, B and 4 more"
    assert shown_authors(["A", "B", "C", "D"], 4, 3) == "A, B, C and 1 more"


@pytest.mark.parametrize(
    "code",
    [
        'import x  # <b>\n\nprint("a & b", f"{x!r:>{3}} and")\n',
        "def f(\n    a,\n):\n    return '''two\nlines'''",
        "x = (",
        "for <script> 'open",
        "",
        *[e.snippet for e in ENTRIES if e.snippet],
    ],
)
def test_marked_python_reads_as_the_code_itself(code):
    made = str(python_markup(code))
    assert "".join(Page(made).words) == code
    assert "<script" not in made
    assert "<b>" not in made


def test_code_is_linked_whether_named_by_owner_or_by_address():
    assert code_url("owner/name") == "https://github.com/owner/name"
    assert code_url("https://gitlab.com/a/b") == "https://gitlab.com/a/b"
    assert code_url("javascript:alert(1)") == "https://github.com/javascript%3Aalert%281%29"
