"""A small, strict XML tree with inclusive canonical form, enough to check a signed document.

Refused, not handled: document types (so no entity can expand), processing instructions, `xml:`
attributes, undeclared prefixes, deep nesting, more elements or prefixes than any manifest has: it
reads what nobody has vouched for yet. It checks no signature (`rim`).

Source: W3C, Canonical XML 1.1 without comments (equal to 1.0 for what is accepted here).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn
from xml.parsers import expat

from cutlayer.tee.refusal import Refusal, refused

__all__ = ["XmlElement", "canonical", "parse_xml"]

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_ELEMENTS = 10_000
_MAX_PREFIXES = 16
_TEXT = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#xD;"}
_VALUE = {"&": "&amp;", "<": "&lt;", '"': "&quot;", "\t": "&#x9;", "\n": "&#xA;", "\r": "&#xD;"}


@dataclass(frozen=True, eq=False)
class XmlElement:
    """One element; children are elements and text in order."""

    tag: str
    """As written, with its prefix."""
    attributes: tuple[tuple[str, str], ...]
    """(name as written, value), without namespace declarations."""
    scope: Mapping[str, str]
    """Namespaces in force by prefix; the default one under the empty prefix."""
    children: list["XmlElement | str"] = field(default_factory=list)

    @property
    def name(self) -> tuple[str, str]:
        """(namespace, local name)."""
        prefix, _, local = self.tag.rpartition(":")
        return self.scope.get(prefix, ""), local

    @property
    def elements(self) -> list["XmlElement"]:
        """Children that are elements."""
        return [child for child in self.children if isinstance(child, XmlElement)]

    @property
    def text(self) -> str:
        """Own text, without that of children."""
        return "".join(child for child in self.children if isinstance(child, str))

    def named(self, *name: str) -> list["XmlElement"]:
        """Children with this (namespace, local name)."""
        return [child for child in self.elements if child.name == name]

    def attribute(self, local: str) -> str | None:
        """Value of an attribute without a namespace."""
        return dict(self.attributes).get(local)

    def expanded_attributes(self) -> dict[tuple[str, str], str]:
        """By (namespace, local name)."""
        return {_expand(name, self.scope): value for name, value in self.attributes}

    def walk(self) -> Iterator["XmlElement"]:
        """Itself and everything below."""
        yield self
        for child in self.elements:
            yield from child.walk()


def _expand(name: str, scope: Mapping[str, str]) -> tuple[str, str]:
    # An attribute without a prefix has no namespace, whatever the default one is.
    prefix, _, local = name.rpartition(":")
    return (scope[prefix] if prefix else ""), local


class _Builder:
    """Handlers of one parse."""

    def __init__(self) -> None:
        self.root: XmlElement | None = None
        self._open: list[XmlElement] = []
        self._num_elements = 0

    def start(self, tag: str, flat: list[str]) -> None:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        scope = dict(self._open[-1].scope) if self._open else {}
        scope |= {k.partition(":")[2]: v for k, v in pairs if _declares(k)}
        self._check_size(scope)
        attributes = tuple(pair for pair in pairs if not _declares(pair[0]))
        for name in (tag, *(name for name, _ in attributes)):
            prefix = name.rpartition(":")[0]
            if prefix and prefix not in scope:
                _refuse(f"prefix {prefix!r} is not declared, or not accepted")
        element = XmlElement(tag, attributes, scope)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)
        if len(self._open) > _MAX_DEPTH:
            _refuse(f"elements nest deeper than {_MAX_DEPTH}")

    def _check_size(self, scope: Mapping[str, str]) -> None:
        # Each element keeps its scope: without limits the two multiply.
        self._num_elements += 1
        if self._num_elements > _MAX_ELEMENTS:
            _refuse(f"more than {_MAX_ELEMENTS} elements")
        if len(scope) > _MAX_PREFIXES:
            _refuse(f"more than {_MAX_PREFIXES} prefixes in force")

    def end(self, _tag: str) -> None:
        self._open.pop()

    def text(self, text: str) -> None:
        self._open[-1].children.append(text)

    def refuse(self, *_: object) -> None:
        _refuse("document types and processing instructions are not accepted")


def _declares(name: str) -> bool:
    return name == "xmlns" or name.startswith("xmlns:")


def _refuse(why: str) -> NoReturn:
    raise refused(Refusal.MALFORMED, f"this XML is not accepted: {why}")


def parse_xml(data: bytes) -> XmlElement:
    """The root element.

    Raises:
        AttestationError: malformed, or with something that is refused (see the module).
    """
    if len(data) > _MAX_BYTES:
        _refuse(f"{len(data)} bytes; the most is {_MAX_BYTES}")
    builder = _Builder()
    parser = expat.ParserCreate()
    parser.ordered_attributes = True
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.text
    parser.StartDoctypeDeclHandler = builder.refuse
    parser.ProcessingInstructionHandler = builder.refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise refused(Refusal.MALFORMED, f"no XML: {error}") from error
    assert builder.root is not None, "expat refuses a document without an element"
    return builder.root


def canonical(element: XmlElement, without: XmlElement | None = None) -> bytes:
    """Canonical form of an element as the apex of its subtree.

    Args:
        element: of a parsed document.
        without: a descendant that is left out (an enveloped signature).
    """
    return "".join(_render(element, {}, without)).encode()


def _render(
    element: XmlElement, rendered: Mapping[str, str], without: XmlElement | None
) -> Iterator[str]:
    new = {p: uri for p, uri in element.scope.items() if rendered.get(p, "") != uri}
    yield f"<{element.tag}"
    for prefix in sorted(new):
        yield f' {f"xmlns:{prefix}" if prefix else "xmlns"}="{_escape(new[prefix], _VALUE)}"'
    for name, value in sorted(element.attributes, key=lambda a: _expand(a[0], element.scope)):
        yield f' {name}="{_escape(value, _VALUE)}"'
    yield ">"
    for child in element.children:
        if isinstance(child, str):
            yield _escape(child, _TEXT)
        elif child is not without:
            yield from _render(child, {**rendered, **new}, without)
    yield f"</{element.tag}>"


def _escape(text: str, table: Mapping[str, str]) -> str:
    return "".join(table.get(char, char) for char in text)
