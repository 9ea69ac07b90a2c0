"""XML as data, by one plain convention, without doctypes, entities or attributes.

The root element stands for the document whatever its name. An element with children is an object, keyed by their tags;
where the schema wants an array, the children are its items whatever their tags. An element without children is text,
read as a number, boolean or null where the schema wants one and the text is one. Attributes, and text beside child
elements, are faults: a schema says nothing about them. defusedxml refuses doctypes, and with them entity bombs and
external files.
"""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree.ElementTree import ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

from tokalign.rewards.structured.documents.document import Fault, Limits

_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,307})(\.[0-9]{1,400})?([eE][-+]?[0-9]{1,3})?")


class _Element:
    __slots__ = ("children", "tag", "text")

    def __init__(self, tag: str):
        self.tag = tag
        self.text: list[str] = []
        self.children: list[_Element] = []


class _Builder:
    """Target of the parser: a light tree within limits."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.count = 0
        self.stack: list[_Element] = []
        self.root: _Element | None = None

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if attributes:
            raise Fault(f"the element {tag[:100]!r} has attributes, which no schema describes")
        if len(self.stack) > self.limits.max_depth:
            raise Fault(f"nested deeper than {self.limits.max_depth}")
        self.count += 1
        if self.count > self.limits.max_values:
            raise Fault(f"more than {self.limits.max_values} values")
        element = _Element(tag)
        if self.stack:
            self.stack[-1].children.append(element)
        self.root = self.root or element
        self.stack.append(element)

    def data(self, text: str) -> None:
        self.stack[-1].text.append(text)

    def end(self, _: str) -> None:
        self.stack.pop()

    def close(self) -> _Element | None:
        return self.root


def decode_xml(text: str, limits: Limits, types: Any = None) -> Any:
    """The value of the document in `text`, typed by `types` (a `Shape` or None: texts). Raises `Fault`."""
    parser = DefusedXMLParser(target=_Builder(limits), forbid_dtd=True)
    try:
        parser.feed(text)
        root = parser.close()
    except ParseError as error:
        raise Fault(f"not XML: {error}") from None
    except DefusedXmlException:
        raise Fault("XML doctypes and entities are not allowed") from None
    if root is None:
        raise Fault("empty")
    return _value(root, types)


def _value(element: _Element, types: Any) -> Any:
    options = [types] if types is None or not types.options else types.options
    wanted = set().union(*({"any"} if o is None or o.types is None else o.types for o in options))
    text = "".join(element.text)
    if not element.children:
        text = text.strip()
        if "object" in wanted and not text:
            return {}
        if "array" in wanted and not text:
            return []
        return text if "string" in wanted else _scalar(text, wanted)
    if text.strip():
        raise Fault(f"the element {element.tag[:100]!r} has text beside its children")
    # with several options the first that is a container says what the children are
    shape = next((o for o in options if o is not None and o.types and o.types & {"array", "object"}), options[0])
    if shape is not None and shape.types and "array" in shape.types:
        return [_value(child, shape.item(i)) for i, child in enumerate(element.children)]
    by_tag: dict[str, Any] = {}
    for child in element.children:
        if child.tag in by_tag:
            raise Fault(f"the element {child.tag[:100]!r} is repeated")
        by_tag[child.tag] = _value(child, None if shape is None else shape.known(child.tag))
    return by_tag


def _scalar(text: str, wanted: set[str]) -> Any:
    if wanted & {"integer", "number"} and _NUMBER.fullmatch(text):
        number = json.loads(text)
        return text if number in (float("inf"), float("-inf")) else number
    if "boolean" in wanted and text in ("true", "false"):
        return text == "true"
    if "null" in wanted and text in ("", "null"):
        return None
    return text
