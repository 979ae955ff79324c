"""Bodies are strict JSON: what `json` reads comes out the same, and a key twice is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from qtool.serve.http.json_body import parse_json

TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text('\\":,{}[]u')
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
)


@settings(max_examples=60)
@given(VALUES, st.booleans())
def test_a_body_is_what_json_reads(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@settings(max_examples=40)
@given(TEXT, VALUES, VALUES, st.booleans())
def test_a_key_that_is_there_twice_is_refused_wherever_it_is(key, value, beside, ascii_only):
    name, text, other = (
        json.dumps(one, ensure_ascii=ascii_only) for one in (key, value, {"a": [beside]})
    )
    body = f'[{other}, {{"x": {{{name}: {text}, {name} :{text}}}}}]'
    with pytest.raises(HTTPException, match="is there twice"):
        parse_json(body.encode())


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"{", b"[1,]", b"nul", b"[NaN]", b"[Infinity]", b"[1e999]", b"[01]"),
        *(b'"\x01"', b'"\\ud800"', b'"\xff"', b"\xef\xbb\xbf{}", b"{}{}", b"{'a': 1}"),
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_is_refused(body):
    with pytest.raises(HTTPException) as refused:
        parse_json(body)
    assert refused.value.status_code == 400
