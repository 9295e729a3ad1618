"""Charts as inline SVG: positions across are percentages, so that they stretch while their text keeps its size."""

import math
from collections.abc import Callable, Sequence
from xml.etree import ElementTree as ET

from markupsafe import Markup

from ._evidence import Arm, Run, World
from ._words import number_format, plain_number, signed

MAX_DOTS = 200
MAX_LABEL = 36
MAX_WORLD = 18
LEFT, RIGHT = 2.0, 98.0  # per cent; marks at the ends of the range stay whole


class _Scale:
    """Carry a value to a position across, in per cent, and give round ticks."""

    def __init__(self, values: Sequence[float], left: float = LEFT, right: float = RIGHT):
        low, high = min(values), max(values)
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        self.low, self.high, self.left, self.right = low - pad, high + pad, left, right

    def __call__(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{self.left + share * (self.right - self.left):.2f}%"

    def ticks(self, wanted: int = 5) -> list[float]:
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw)
        first = math.ceil(self.low / step)
        found = [i * step for i in range(first, math.floor(self.high / step) + 1)]
        # A label in the middle of its tick would be cut off at the very edge.
        return [t for t in found if 0.05 < (t - self.low) / (self.high - self.low) < 0.95] or found


def _svg(key: str, height: int, title: str, description: str) -> ET.Element:
    root = ET.Element("svg", {
        "class": "chart", "width": "100%", "height": str(height), "role": "img",
        "aria-labelledby": f"{key}-title {key}-desc", "fill": "currentColor", "stroke": "none",
    })  # fmt: skip
    ET.SubElement(root, "title", id=f"{key}-title").text = title
    ET.SubElement(root, "desc", id=f"{key}-desc").text = description
    return root


def _line(parent: ET.Element, x1: str, x2: str, y1: int | float, y2: int | float, kind: str) -> None:
    ET.SubElement(
        parent, "line", {"class": kind, "x1": x1, "x2": x2, "y1": f"{y1:g}", "y2": f"{y2:g}", "stroke": "currentColor"}
    )


def _text(parent: ET.Element, x: str, y: int | float, text: str, kind: str = "", anchor: str = "start") -> None:
    shown = text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"
    ET.SubElement(parent, "text", {"class": kind, "x": x, "y": f"{y:g}", "text-anchor": anchor}).text = shown


def _mark(parent: ET.Element, x: str, y: int | float, kind: str) -> None:
    """Draw the mean: a disc for the method, a diamond for the baseline, a square for any other arm."""
    if kind == "method":
        ET.SubElement(parent, "circle", {"class": "mark mark-method", "cx": x, "cy": f"{y:g}", "r": "6"})
        return
    shape = "M0-7 7 0 0 7-7 0Z" if kind == "baseline" else "M-5-5H5V5H-5Z"
    holder = ET.SubElement(parent, "svg", {"x": x, "y": f"{y:g}", "overflow": "visible", "width": "1", "height": "1"})
    ET.SubElement(holder, "path", {"class": f"mark mark-{kind}", "d": shape})


def _kind(arm: Arm) -> str:
    return arm.name if arm.name in ("method", "baseline") else "other"


def _finish(root: ET.Element) -> Markup:
    # ElementTree has escaped every text and attribute.
    return Markup(ET.tostring(root, encoding="unicode"))


def mini_chart(run: Run, key: str) -> Markup:
    """Draw method and baseline of the run's leading world, as small as a card wants it."""
    arms = [run.lead.arm("method"), run.lead.arm("baseline")]
    words = number_format([arm.mean for arm in arms])
    scale = _Scale([end for arm in arms for end in (*arm.interval, arm.mean)], 25.0, 76.0)
    root = _svg(key, 58, "Method against baseline", f"{_sentence(run.lead, arms, words)} {better_words(run)}.")
    for i, arm in enumerate(arms):
        y = 15 + 27 * i
        _line(root, "22%", "79%", y, y, "track")
        _line(root, scale(arm.interval[0]), scale(arm.interval[1]), y, y, f"interval interval-{_kind(arm)}")
        _mark(root, scale(arm.mean), y, _kind(arm))
        _text(root, "0", y + 4.5, arm.name, f"label-{_kind(arm)}")
        _text(root, "100%", y + 4.5, words(arm.mean), f"value label-{_kind(arm)}", "end")
    return _finish(root)


def arms_chart(run: Run, world: World, key: str) -> Markup:
    """Draw every arm of one world: mean, interval of the mean, and a dot for each seed."""
    ends = [end for arm in world.arms for end in (*arm.interval, *arm.trials, arm.mean)]
    words, scale = number_format(ends), _Scale(ends)
    bottom = 52 * len(world.arms) + 6
    root = _svg(
        key,
        bottom + 22,
        f"All arms in the world {world.name}",
        f"{_sentence(world, world.arms, words)} {better_words(run)}.",
    )
    _axis(root, scale, bottom)
    for i, arm in enumerate(world.arms):
        kind, top = _kind(arm), 52 * i
        y = top + 34
        _text(root, "0", top + 15, arm.name, f"label label-{kind}")
        _text(root, "100%", top + 15, words(arm.mean), f"value label-{kind}", "end")
        _line(root, "0", "100%", y, y, "track")
        for j, value in enumerate(arm.trials[:MAX_DOTS]):
            # Golden-ratio offsets spread dots of equal value without chance.
            offset = 14 * ((j * 0.618034) % 1 - 0.5)
            dot = {"class": f"dot dot-{kind}", "cx": scale(value), "cy": f"{y + offset:.1f}", "r": "3"}
            ET.SubElement(root, "circle", dot)
        _line(root, scale(arm.interval[0]), scale(arm.interval[1]), y, y, f"interval interval-{kind}")
        _mark(root, scale(arm.mean), y, kind)
    return _finish(root)


def gain_chart(runs: Sequence[Run], key: str) -> Markup:
    """Draw the gain of every world of runs that share metric and margin, against the margin: what is judged."""
    worlds = [world for run in runs for world in run.worlds]
    margin = runs[0].margin
    ends = [0.0, margin, *(end for world in worlds for end in (*world.interval, world.gain))]
    words, scale = number_format(ends), _Scale(ends)
    top, bottom = 24, 24 + 30 * len(runs) + 44 * len(worlds) + 6
    told = "; ".join(f"{run.source}, {run.about}: {_gains(run, words)}" for run in runs)
    root = _svg(key, bottom + 22, "Gain over the baseline", f"The margin is {plain_number(margin)}. {told}.")
    start = float(scale(margin).rstrip("%"))
    zone = {"class": "zone", "x": scale(margin), "y": f"{top}", "width": f"{100 - start:.2f}%"}
    ET.SubElement(root, "rect", zone | {"height": f"{bottom - top}"})
    _axis(root, scale, bottom)
    _line(root, scale(0.0), scale(0.0), top, bottom, "zero")
    _line(root, scale(margin), scale(margin), top - 4, bottom, "margin")
    anchor = "start" if start < 25 else "end" if start > 75 else "middle"
    _text(root, scale(margin), top - 9, f"margin {plain_number(margin)}", "margin-label", anchor)
    y = top
    for run in runs:
        y += 30
        _text(root, "0.8%", y - 11, f"{run.source}, {run.about}", "run-label")
        for world in run.worlds:
            kind, place = "other" if world.role == "control" else "method", y + 24
            _text(root, "0.8%", place - 14, _world_name(world), "label")
            _text(root, "99.2%", place - 14, f"{signed(words(world.gain))} {world.verdict}", "value", "end")
            _line(root, "0", "100%", place, place, "track")
            _line(root, scale(world.interval[0]), scale(world.interval[1]), place, place, f"interval interval-{kind}")
            _mark(root, scale(world.gain), place, kind)
            y += 44
    return _finish(root)


def _world_name(world: World) -> str:
    name = world.name if len(world.name) <= MAX_WORLD else world.name[: MAX_WORLD - 1] + "…"
    return f"{name} (control)" if world.role == "control" else name


def _gains(run: Run, words: Callable[[float], str]) -> str:
    return ", ".join(
        f"{world.name}{' (control)' if world.role == 'control' else ''} {signed(words(world.gain))}, "
        f"interval {words(world.interval[0])} to {words(world.interval[1])}, {world.verdict}"
        for world in run.worlds
    )


def _axis(root: ET.Element, scale: _Scale, y: int | float) -> None:
    _line(root, "0", "100%", y, y, "axis")
    for tick in scale.ticks():
        _line(root, scale(tick), scale(tick), y, y + 4, "axis")
        _text(root, scale(tick), y + 18, plain_number(tick), "tick", "middle")


def better_words(run: Run) -> str:
    """Return which way is better, as words."""
    return f"{run.better.capitalize()} is better"


def _sentence(world: World, arms: Sequence[Arm], words: Callable[[float], str]) -> str:
    told = "; ".join(
        f"{arm.name} {words(arm.mean)}, interval {words(arm.interval[0])} to {words(arm.interval[1])}" for arm in arms
    )
    return f"World {world.name}, {len(world.seeds)} seeds: {told}."
