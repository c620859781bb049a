"""The XML that manifests are made of: the standard's own examples, and what is never parsed."""

import pytest

from cutlayer.errors import AttestationError
from cutlayer.tee.xml_canonical import canonical, parse_xml

# W3C, Canonical XML 1.0, section 3.3, without its document type.
TAGS = """<doc>
   <e1   />
   <e2   ></e2>
   <e3   name = "elem3"   id="elem3"   />
   <e5 a:attr="out" b:attr="sorted" attr2="all" attr="I'm"
      xmlns:b="http://www.ietf.org"
      xmlns:a="http://www.w3.org"
      xmlns="http://example.org"/>
   <e6 xmlns="" xmlns:a="http://www.w3.org">
      <e7 xmlns="http://www.ietf.org">
         <e8 xmlns="" xmlns:a="http://www.w3.org">
            <e9 xmlns="" xmlns:a="http://www.ietf.org"/>
         </e8>
      </e7>
   </e6>
</doc>"""
CANONICAL_TAGS = """<doc>
   <e1></e1>
   <e2></e2>
   <e3 id="elem3" name="elem3"></e3>
   <e5 xmlns="http://example.org" xmlns:a="http://www.w3.org" xmlns:b="http://www.ietf.org" \
attr="I'm" attr2="all" b:attr="sorted" a:attr="out"></e5>
   <e6 xmlns:a="http://www.w3.org">
      <e7 xmlns="http://www.ietf.org">
         <e8 xmlns="">
            <e9 xmlns:a="http://www.ietf.org"></e9>
         </e8>
      </e7>
   </e6>
</doc>"""
# Section 3.4, likewise.
CHARACTERS = """<doc>
   <text>First line&#x0d;&#10;Second line</text>
   <value>&#x32;</value>
   <compute><![CDATA[value>"0" && value<"10" ?"valid":"error"]]></compute>
   <compute expr='value>"0" &amp;&amp; value&lt;"10" ?"valid":"error"'>valid</compute>
   <norm attr=' &apos;   &#x20;&#13;&#xa;&#9;   &apos; '/>
</doc>"""
CANONICAL_CHARACTERS = """<doc>
   <text>First line&#xD;
Second line</text>
   <value>2</value>
   <compute>value&gt;"0" &amp;&amp; value&lt;"10" ?"valid":"error"</compute>
   <compute expr="value>&quot;0&quot; &amp;&amp; value&lt;&quot;10&quot; ?&quot;valid&quot;:\
&quot;error&quot;">valid</compute>
   <norm attr=" '    &#xD;&#xA;&#x9;   ' "></norm>
</doc>"""
LAUGHS = b"""<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><x>&b;</x>"""


@pytest.mark.parametrize(
    ("text", "expected"), [(TAGS, CANONICAL_TAGS), (CHARACTERS, CANONICAL_CHARACTERS)]
)
def test_canonical_form_is_the_standards(text: str, expected: str) -> None:
    assert canonical(parse_xml(text.encode())).decode() == expected
    assert canonical(parse_xml(expected.encode())).decode() == expected


def test_part_carries_the_namespaces_around_it() -> None:
    root = parse_xml(b'<a xmlns="urn:1" xmlns:p="urn:2"><!-- no --><p:b c="1"><d/></p:b></a>')
    part = canonical(root.elements[0])
    assert part == b'<p:b xmlns="urn:1" xmlns:p="urn:2" c="1"><d></d></p:b>'
    assert canonical(root, without=root.elements[0]) == b'<a xmlns="urn:1" xmlns:p="urn:2"></a>'


def test_names_are_expanded() -> None:
    root = parse_xml(b'<a xmlns="urn:1" xmlns:p="urn:2" p:c="1" d="2"><p:b>text</p:b></a>')
    assert root.name == ("urn:1", "a")
    assert root.expanded_attributes() == {("urn:2", "c"): "1", ("", "d"): "2"}
    assert [child.text for child in root.named("urn:2", "b")] == ["text"]


@pytest.mark.parametrize(
    "data",
    [
        LAUGHS,
        b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><x/>',
        b"<?php x ?><x/>",
        b'<x xml:lang="en"/>',
        b"<p:x/>",
        b"<x>&unknown;</x>",
        b"<x>" * 40 + b"</x>" * 40,
        b"<x/>" + b" " * (1 << 20),
        b"",
        b"<x><y></x></y>",
        b"\xff\xfe<",
        b'<?xml version="1.0" encoding="no-such"?><x/>',
    ],
)
def test_what_is_not_needed_is_not_parsed(data: bytes) -> None:
    with pytest.raises(AttestationError, match="malformed"):
        parse_xml(data)


def test_elements_and_prefixes_do_not_multiply_into_gigabytes() -> None:
    declared = " ".join(f'xmlns:p{n}="{n}"' for n in range(5000))
    for head, children in ((f"<r {declared}>", 10), ("<r>", 50_000)):
        with pytest.raises(AttestationError, match="more than"):
            parse_xml(f"{head}{'<a/>' * children}</r>".encode())
