"""A chart that matplotlib wrote as SVG, made part of a page: its colours, no ids twice, small."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

NUMBER = re.compile(r"-?\d+\.\d+")
GEOMETRY = ("d", "x", "y", "width", "height", "transform")
LINK = "{http://www.w3.org/1999/xlink}href"


def inline(svg: str, *, prefix: str, label: str, colours: Mapping[str, str]) -> str:
    """Turn an SVG document of matplotlib into an element for an HTML page.

    Texts stay as they are, escaped; fonts are left to the page. An id `run2.…` becomes the class
    run2, which the page can hide.

    Args:
        svg: The document.
        prefix: Put before every id, to make it the only one of its name on the page.
        label: What the picture shows, for those who do not see it.
        colours: What to write for each hexadecimal colour.

    Returns:
        The element as HTML.
    """
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if _name(child) in ("metadata", "style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w.-]+)", " ".join(_references(root))))
    for element in root.iter():
        element.tag = _name(element)
        _clean(element, prefix, used, colours)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _references(root: ElementTree.Element) -> list[str]:
    return [
        value
        for element in root.iter()
        for key, value in element.attrib.items()
        if key in (LINK, "href", "clip-path")
    ]


def _clean(
    element: ElementTree.Element, prefix: str, used: set[str], colours: Mapping[str, str]
) -> None:
    attributes = element.attrib
    own = attributes.pop("id", None)
    if own and own.startswith("run"):
        attributes["class"] = own.partition(".")[0]
    elif own in used:
        attributes["id"] = f"{prefix}-{own}"
    if LINK in attributes:
        attributes["href"] = f"#{prefix}-{attributes.pop(LINK).removeprefix('#')}"
    if "clip-path" in attributes:
        attributes["clip-path"] = attributes["clip-path"].replace("#", f"#{prefix}-")
    for key in GEOMETRY:
        if key in attributes:
            short = NUMBER.sub(lambda found: f"{float(found.group()):.2f}", attributes[key])
            attributes[key] = " ".join(short.split())
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    if "style" in attributes:
        style = re.sub(r"font-family: [^;]*;? ?", "", attributes["style"])
        for colour, shown in colours.items():
            style = style.replace(colour, shown)
        attributes["style"] = style
    if element.text and not element.text.strip():
        element.text = None
    element.tail = None
