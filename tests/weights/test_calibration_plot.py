"""The drawing of a calibration: well-formed, whole, inside its picture, and with nothing of a name unescaped."""

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

from weights.calibration import FORMAT, Calibration, Option, Quality, Speed
from weights.calibration_plot import HEIGHT, WIDTH, curve, svg

SVG = "{http://www.w3.org/2000/svg}"


def option(name: str, rate: float, relative: float) -> Option:
    """An option of so many tokens per second."""
    speed = Speed({"1": 1000 / rate}, {"1": rate}, 10 * rate)
    quality = Quality(loss=1.0, perplexity=math.e, agreement=0.9, kl=0.1, relative=relative)
    return Option(name, (1,), quality, speed, 1.0, 1e6, 1e6, 100 / rate)


def calibration(*options: Option, model: str = "tiny") -> Calibration:
    """A file with these options; the count is trained at 4."""
    return Calibration(
        format=FORMAT,
        checkpoint="0" * 64,
        model=model,
        version="0",
        created="",
        machine="a processor",
        dtype="float32",
        kernels="torch",
        text="a text",
        tokens=10,
        trained=4,
        layers=1,
        options=options,
        aiq=0.5,
    )


THREE = (option("k1", 200, 0.8), option("k2", 150, 0.85), option("k4", 100, 1.0))


def test_every_option_has_a_point_and_a_name_inside_the_picture() -> None:
    root = ElementTree.fromstring(svg(calibration(*THREE, option("k8", 60, 0.99))))
    circles = root.findall(f"{SVG}circle")
    assert [circle.get("class") for circle in circles] == ["point", "point", "trained", "point"]
    texts = {text.text for text in root.findall(f"{SVG}text")}
    assert {"k1", "k2", "k4 (trained)", "k8", "tiny: quality against speed"} <= texts
    for circle in circles:
        assert 0 < float(circle.get("cx", "")) < WIDTH and 0 < float(circle.get("cy", "")) < HEIGHT
    assert float(circles[0].get("cx", "")) > float(circles[2].get("cx", ""))  # faster is to the right
    assert float(circles[0].get("cy", "")) > float(circles[2].get("cy", ""))  # worse is below


def test_the_hull_is_that_of_time_and_quality() -> None:
    line = curve(calibration(*THREE))
    assert line[0] == pytest.approx((200, 0.8))
    assert line[-1] == pytest.approx((100, 1.0))
    half = next(rate for rate, quality in line if quality == pytest.approx(0.9))
    assert half == pytest.approx(2 / (1 / 200 + 1 / 100))  # half of the tokens at either end: times add up
    assert all(quality >= 0.85 for rate, quality in line if rate <= 150)  # the second is on or below it


def test_beyond_the_best_option_the_hull_is_flat() -> None:
    line = curve(calibration(*THREE, option("k8", 50, 0.9)))
    assert [quality for _, quality in line[-2:]] == [1.0, 1.0]
    assert [rate for rate, _ in line[-2:]] == pytest.approx([100, 50])


def test_names_are_text_whatever_is_in_them() -> None:
    name = '</text><script>alert("&")</script>\x07'
    root = ElementTree.fromstring(svg(calibration(option(name, 100, 1.0), model=name)))
    assert not list(root.iter(f"{SVG}script"))
    shown = [text.text or "" for text in root.findall(f"{SVG}text")]
    assert any("<script>" in text and "\\x07" in text for text in shown)


def test_names_of_near_points_do_not_cover_one_another() -> None:
    near = [option(f"k{count}", 100 + count / 100, 0.9) for count in range(6)] + [option("far", 400, 0.5)]
    root = ElementTree.fromstring(svg(calibration(*near)))
    texts = {text.text: float(text.get("y", "")) for text in root.findall(f"{SVG}text")}
    heights = sorted(texts[each] for each in ("k0", "k1", "k2", "k3", "k4 (trained)", "k5"))
    assert all(lower - higher > 11 for higher, lower in pairwise(heights))


def test_nothing_timed_and_one_option_can_be_drawn() -> None:
    for options in ((), (replace(THREE[0], speed=None),), THREE[:1]):
        assert ElementTree.fromstring(svg(calibration(*options))).tag == f"{SVG}svg"
