import dataclasses
import json
from xml.etree import ElementTree as ET

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyspan.catalog import entries
from polyspan.errors import CorruptFile, FileError, UnreadableFile, WrongContent
from polyspan.gallery import build_gallery
from polyspan.gallery._charts import arms_chart, gain_chart, mini_chart
from polyspan.gallery._evidence import read_runs

SLUG = entries()[0].slug
SCRIPT = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'"


@pytest.fixture
def read(tmp_path, put):
    def write_and_read(evidence):
        put(tmp_path, evidence, "one.json")
        return read_runs(tmp_path, "your run", own=False, slugs=[SLUG])[0]

    return write_and_read


def test_evidence_comes_back_with_its_arms_in_order_and_every_number(read, make_evidence):
    evidence = make_evidence(SLUG)
    run = read(evidence)
    assert [arm.name for arm in run.lead.arms] == ["method", "baseline", "least squares"]
    main = evidence["worlds"][0]
    for arm in run.lead.arms:
        assert arm.mean == main["means"][arm.name]
        assert list(arm.interval) == main["intervals"][arm.name]
        assert list(arm.trials) == main["trials"][arm.name]
    assert (run.lead.gain, run.lead.interval, run.lead.seeds) == (0.2, (0.15, 0.25), (0, 1, 2, 3, 4))


def test_the_world_that_decides_the_verdict_is_the_one_shown(read, make_evidence):
    evidence = make_evidence(SLUG, "fails")
    won = make_evidence(SLUG)["worlds"][0] | {"world": "another"}
    assert read(evidence | {"worlds": [won, *evidence["worlds"]]}).lead.name == "planted"
    assert read(make_evidence(SLUG) | {"worlds": [won]}).lead.name == "another"


def at(evidence, *path):
    for key in path[:-1]:
        evidence = evidence[key]
    return evidence, path[-1]


WRONG = [
    (("schema",), 2),
    (("slug",), "../../etc/passwd"),
    (("level",), "huge"),
    (("verdict",), "wins"),
    (("better",), "sideways"),
    (("margin",), "0.02"),
    (("margin",), True),
    (("margin",), 10**400),
    (("control_ok",), 1),
    (("statement",), ""),
    (("statement",), ["a"]),
    (("statement",), "x" * 5000),
    (("statement",), "a\x00b"),
    (("method",), "a\x1b[31m"),
    (("created",), "yesterday"),
    (("created",), "2026-13-45T04:00:00Z"),
    (("wall_s",), -1),
    (("machine",), []),
    (("machine", "cpu"), {"deep": 1}),
    (("versions", "numpy"), [2]),
    (("worlds",), []),
    (("worlds",), [3]),
    (("worlds", 0, "role"), "boss"),
    (("worlds", 0, "role"), "control"),
    (("worlds", 0, "interval"), [0.3, 0.1]),
    (("worlds", 0, "interval"), [0.3]),
    (("worlds", 0, "means", "baseline"), None),
    (("worlds", 0, "means"), {"method": 1.0}),
    (("worlds", 0, "intervals"), {}),
    (("worlds", 0, "trials", "method"), [0.9]),
    (("worlds", 0, "trials", "method"), ["0.9"] * 5),
    (("worlds", 0, "seeds"), [0.5, 1, 2, 3, 4]),
    (("worlds", 0, "gain"), 1e300),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda x: str(x)[:40])
def test_a_wrong_field_is_an_error_that_names_the_file_and_the_field(read, make_evidence, tmp_path, path, value):
    evidence = make_evidence(SLUG)
    holder, key = at(evidence, *path)
    holder[key] = value
    with pytest.raises(WrongContent) as caught:
        read(evidence)
    assert caught.value.path == str(tmp_path / "one.json")
    assert path[0] in ("schema",) or str(path[0]) in f"{caught.value.where} {caught.value.expected}"


def test_every_missing_field_is_told(read, make_evidence):
    whole = make_evidence(SLUG)
    for holder in (whole, whole["worlds"][0]):
        for key in list(holder):
            kept = holder.pop(key)
            with pytest.raises(WrongContent, match=r"one\.json"):
                read(whole)
            holder[key] = kept
    assert read(whole).slug == SLUG


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(tmp_path, make_evidence, text):
    broken = json.dumps(make_evidence(SLUG)).replace('"gain": 0.2', f'"gain": {text}')
    assert text in broken
    (tmp_path / "nan.json").write_text(broken)
    with pytest.raises(CorruptFile, match=r"nan\.json"):
        read_runs(tmp_path, "your run", own=False, slugs=[SLUG])


def test_verdicts_that_do_not_follow_from_the_numbers_are_refused(read, make_evidence):
    boast = make_evidence(SLUG, "fails")
    boast["verdict"] = boast["worlds"][0]["verdict"] = "holds"
    with pytest.raises(WrongContent, match="what the margin"):
        read(boast)
    boast = make_evidence(SLUG, "open")
    boast["verdict"] = "holds"
    with pytest.raises(WrongContent, match="follows from the worlds"):
        read(boast)
    boast = make_evidence(SLUG)
    boast["worlds"][1] |= {"verdict": "open", "interval": [-0.1, 0.1]}
    with pytest.raises(WrongContent, match="follows from the control"):
        read(boast)
    assert read(boast | {"control_ok": False, "verdict": "open"}).verdict == "open"


def test_another_files_json_and_a_missing_folder_are_told(tmp_path):
    (tmp_path / "settings.json").write_text("[1, 2]")
    with pytest.raises(WrongContent, match=r"settings\.json"):
        read_runs(tmp_path, "your run", own=False, slugs=[SLUG])
    with pytest.raises(UnreadableFile, match="nowhere"):
        build_gallery(tmp_path / "site", evidence=[tmp_path / "nowhere"])


def test_scripts_in_evidence_and_catalogue_are_shown_not_run(tmp_path, make_evidence, put):
    entry = dataclasses.replace(
        entries()[0], title=SCRIPT, authors=(SCRIPT,), summary=SCRIPT, aliases=(SCRIPT,), object=SCRIPT,
        names=(SCRIPT,), snippet=SCRIPT, command=SCRIPT, code=SCRIPT, arxiv=SCRIPT, module=SCRIPT, commands=(SCRIPT,),
        extras=(SCRIPT,),
    )  # fmt: skip
    evidence = make_evidence(SLUG)
    for key in ("statement", "method", "baseline", "metric", "why"):
        evidence[key] = SCRIPT
    evidence["machine"][SCRIPT] = evidence["versions"][SCRIPT] = evidence["control"] = SCRIPT
    for world in evidence["worlds"]:
        world["world"] = world["data_digest"] = SCRIPT
        for part in ("means", "intervals", "trials"):
            world[part][SCRIPT] = world[part]["least squares"]
    put(tmp_path / "evil", evidence, f"{SCRIPT.replace('/', '')}.json")
    built = build_gallery(tmp_path / "site", evidence=[tmp_path / "evil"], entries=[entry])
    for path in built.rglob("*.html"):
        text = path.read_text("utf-8")
        assert "<script>" not in text
        assert "<img" not in text
        assert "&lt;script&gt;alert(1)" in text
    feed = ET.fromstring((built / "feed.xml").read_text("utf-8"))
    assert feed.find("{*}entry/{*}title").text == SCRIPT


@pytest.mark.parametrize("field", ["slug", "family"])
def test_a_slug_that_could_leave_the_folder_is_refused(tmp_path, folders, field):
    entry = dataclasses.replace(entries()[0], **{field: "../up"})
    with pytest.raises(ValueError, match=field):
        build_gallery(tmp_path / "site", evidence=[], entries=[entry])


numbers = st.floats(-1e100, 1e100) | st.sampled_from([0.0, 1e-300, -1e-12, 1e100])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(numbers, min_size=3, max_size=6), margin=numbers)
def test_charts_keep_every_mark_inside_whatever_the_numbers(read, make_evidence, values, margin):
    evidence = make_evidence(SLUG, "open")
    low, middle, high = sorted(values[:3])
    world = evidence["worlds"][0]
    world |= {"gain": middle, "interval": [low, high], "seeds": list(range(len(values)))}
    for arm in world["means"]:
        world["means"][arm], world["intervals"][arm], world["trials"][arm] = middle, [low, high], values
    evidence |= {"margin": margin, "worlds": [world], "control": "", "control_ok": True}
    run = read(evidence)
    for chart in (mini_chart(run, "a"), arms_chart(run, run.lead, "b"), gain_chart([run], "c")):
        root = ET.fromstring(str(chart))
        for node in root.iter():
            for key in ("x", "x1", "x2", "cx"):
                place = node.get(key, "0")
                assert 0 <= float(place.rstrip("%")) <= 100
        assert root.find("title").text
        assert root.find("desc").text


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_file_ends_in_anything_but_a_file_error(tmp_path, make_evidence, data):
    evidence = make_evidence(SLUG)
    node = evidence
    while isinstance(node, dict | list) and node:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(node[key], dict | list) or data.draw(st.booleans()):
            node[key] = data.draw(st.none() | st.booleans() | st.integers() | st.text() | st.just([]) | st.just({}))
            break
        node = node[key]
    (tmp_path / "damaged.json").write_text(json.dumps(evidence))
    try:
        runs, told = read_runs(tmp_path, "your run", own=False, slugs=[SLUG]), ""
    except FileError as error:
        runs, told = [], str(error)
    assert bool(runs) != ("damaged.json" in told)
    for run in runs:
        assert gain_chart([run], "a")
        assert arms_chart(run, run.lead, "b")
