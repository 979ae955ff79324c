"""Text that comes token by token is the text the tokenizer decodes at once, cut at the first stop
string, and nothing of it comes too early.
"""

from __future__ import annotations

import time
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EXAMPLE, ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qtool.engine import detokenizer
from qtool.engine.detokenizer import HALF, MOST_HELD, Detokenizer, special_ids
from qtool.engine.sampling_params import SamplingParams

TINY = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))


class TextStream(detokenizer.TextStream):
    """Remembers the text that was taken."""

    taken = ""

    def take(self) -> str:
        new = super().take()
        self.taken += new
        return new

    @property
    def text(self) -> str:
        """All text that is safe to give out, whether taken or not."""
        return self.taken + "".join(self._safe)


def byte_level_tokenizer() -> Tokenizer:
    """Every byte a token, and a few longer ones; some of them end inside a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    pieces = [encode(text)[0][0] for text in ("stop", " the", "世界", "st", "op")]
    pieces += [
        encode("世")[0][0][:2],
        encode("a世")[0][0][:2],
        encode("😀")[0][0][:3],
        encode("界b")[0][0][1:],
    ]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*letters, *pieces])}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<end>", special=True), AddedToken("<start>", special=True)]
    )
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: pieces with a mark for the space, and bytes for all else."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁stop",
        "st",
        "op",
        "a",
        "▁the",
        "世",
        "ö",
        "▁▁",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return tokenizer


LEVEL, FALLBACK = byte_level_tokenizer(), byte_fallback_tokenizer()
BYTE = {byte: FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}


def level_ids(data: bytes) -> list[int]:
    return [LEVEL.token_to_id(BYTE_LETTERS[byte]) for byte in data]


def byte_letters() -> dict[int, str]:
    """GPT-2's letter of each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


BYTE_LETTERS = byte_letters()
TEXT_OF_BYTES = st.lists(
    st.sampled_from(["世", "😀", "é", "a", " ", "\n"]), min_size=1, max_size=4
).map("".join)
FALLBACK_PIECES = st.one_of(
    st.sampled_from([0, 1, 2, *range(259, FALLBACK.get_vocab_size())]).map(lambda token: [token]),
    TEXT_OF_BYTES.map(lambda text: [BYTE[byte] for byte in text.encode()]),
)
SEQUENCES = st.one_of(
    st.tuples(
        st.just(TINY),
        st.lists(
            st.one_of(st.integers(0, 4095), st.integers(4, 260), st.integers(0, 3)), max_size=40
        ),
    ),
    st.tuples(
        st.just(LEVEL),
        st.lists(
            st.one_of(st.integers(0, LEVEL.get_vocab_size() + 3), st.integers(256, 266)),
            max_size=60,
        ),
    ),
    st.tuples(st.just(LEVEL), TEXT_OF_BYTES.map(lambda text: level_ids(text.encode()))),
    st.tuples(
        st.just(FALLBACK),
        st.lists(FALLBACK_PIECES, max_size=12).map(lambda pieces: [*chain(*pieces)]),
    ),
)


def stops_in(text: str, draw) -> list[str]:
    """Stop strings of which most occur in ``text``."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(text) - 1)))
        found.append(
            text[start : start + draw(st.integers(1, 6))] + draw(st.sampled_from(["", "", "", "x"]))
            or "z"
        )
    return found


def cut(text: str, stops, exempt=0):
    """Where the stop string begins that is complete first, and it; the longest, if several end
    there.
    """
    found = [
        (i + len(s), i, s)
        for s in stops
        for i in range(len(text))
        if text.startswith(s, i) and i + len(s) > exempt
    ]
    return min(found)[1:] if found else (len(text), None)


@pytest.mark.slow
@settings(max_examples=400)
@given(SEQUENCES, st.booleans())
def test_the_pieces_are_what_the_tokenizer_decodes_at_once(sequence, skip):
    tokenizer, ids = sequence
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    stream = TextStream(tokenizer, SamplingParams(max_new_tokens=None, skip_special_tokens=skip))
    taken = ""
    for token in ids:
        assert stream.push(token) is None
        taken += stream.take()
        assert whole.startswith(taken)
        assert stream.text == taken
    assert taken + stream.finish() == whole == stream.text


@pytest.mark.slow
@settings(max_examples=400)
@given(st.data(), SEQUENCES, st.booleans(), st.sampled_from([0, 0, 1, 4, 10]), st.booleans())
def test_the_text_ends_at_the_first_stop_string(data, sequence, keep, least, short):
    tokenizer, ids = sequence
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stops = stops_in(whole, data.draw)
    params = SamplingParams(
        max_new_tokens=None, stop=stops, no_stop_trim=keep, min_new_tokens=least
    )
    plain = Detokenizer(tokenizer, special_ids(tokenizer))
    # what a stream without stop strings gave so far, and by the end of min_new_tokens
    known, exempt = (
        "",
        0,
    )
    stream = TextStream(tokenizer, params, max_new_tokens=max(1, len(ids)) if short else None)
    for number, token in enumerate(ids, 1):
        known += plain.push(token)
        exempt = len(known) if number <= least else exempt
        reason = stream.push(token)
        if reason is not None:
            break
        held = known[len(stream.text) :]
        # no more is held back than must be
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    stream.finish()
    if least >= len(ids):
        exempt = len(whole) if not short else exempt
    place, stop = cut(whole, stops, exempt)
    if stop is not None and least >= len(ids):
        return  # the last half character came after min_new_tokens or before, as one likes
    assert stream.text == whole[: place + len(stop or "") if keep else place]
    if stop is not None:
        assert stream.reason == {"type": "stop", "matched": stop}
    elif short and ids:
        assert stream.reason == {"type": "length", "length": len(ids)}


@given(
    st.text("ab", min_size=1, max_size=14),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.data(),
)
def test_how_the_text_is_split_into_tokens_changes_nothing(text, stops, data):
    vocabulary = {
        piece: i
        for i, piece in enumerate(
            sorted({text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)})
        )
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    stream, rest = TextStream(tokenizer, SamplingParams(stop=stops)), text
    while rest and stream.reason is None:
        piece = rest[: data.draw(st.integers(1, len(rest)))]
        stream.push(vocabulary[piece])
        rest = rest[len(piece) :]
    stream.finish()
    place, _ = cut(text, stops)
    assert stream.text == text[:place]


# bytes that are no characters


def taken_of(tokenizer, ids, **params):
    stream = TextStream(tokenizer, SamplingParams(max_new_tokens=None, **params))
    pieces = []
    for token in ids:
        stream.push(token)
        pieces.append(stream.take())
    return [*pieces, stream.finish()]


def test_a_character_comes_whole_with_its_last_byte():
    assert taken_of(LEVEL, level_ids("世a".encode())) == ["", "", "世", "a", ""]
    assert taken_of(FALLBACK, [BYTE[byte] for byte in "世😀".encode()]) == [
        "",
        "",
        "世",
        "",
        "",
        "",
        "😀",
        "",
    ]


@pytest.mark.parametrize("tokenizer", [LEVEL, FALLBACK], ids=["byte level", "byte fallback"])
def test_what_is_left_of_a_character_comes_at_the_end(tokenizer):
    half = "世".encode()[:2]
    ids = level_ids(half) if tokenizer is LEVEL else [BYTE[byte] for byte in half]
    *pieces, last = taken_of(tokenizer, ids)
    assert "".join(pieces) == "" and last == tokenizer.decode(ids) and set(last) == {HALF}


@given(
    st.lists(
        st.one_of(st.sampled_from(sorted(BYTE.values())), st.sampled_from([259, 261, 263])),
        max_size=50,
    )
)
def test_wrong_bytes_take_back_nothing(ids):
    text = "".join(taken_of(FALLBACK, ids))
    letters = "".join(character for character in FALLBACK.decode(ids) if character != HALF)
    remaining = iter(text)
    # all the tokenizer can read is there, in this order
    assert all(character in remaining for character in letters)


def test_a_space_after_wrong_bytes_is_kept():
    wrong = [BYTE[0xE4]] * 40
    assert "".join(
        taken_of(FALLBACK, [FALLBACK.token_to_id("a"), *wrong, FALLBACK.token_to_id("▁the")])
    ).endswith(HALF + " the")
    unknown = [FALLBACK.get_vocab_size() + 1] * 40
    assert (
        "".join(
            taken_of(FALLBACK, [FALLBACK.token_to_id("a"), *unknown, FALLBACK.token_to_id("▁the")])
        )
        == "a the"
    )


@pytest.mark.parametrize(
    "data", [b"\xe4" * 200, b"\x80" * 200, b"\xf0\x9f\x98" * 70, b"\xe4\xb8" * 100], ids=repr
)
def test_wrong_bytes_without_end_are_given_out_as_they_come(data):
    pieces = taken_of(LEVEL, level_ids(data))
    assert "".join(pieces) == data.decode(errors="replace")
    assert len("".join(pieces[:-1])) > len("".join(pieces)) - MOST_HELD


def test_a_valid_character_after_wrong_bytes_is_read():
    data = b"\xf0\x9f\x98" * 21 + "😀".encode() + b"\xe4" * 30 + "世".encode()
    assert "".join(taken_of(LEVEL, level_ids(data))) == data.decode(errors="replace")


def test_a_character_with_special_tokens_inside_is_still_one():
    end = LEVEL.token_to_id("<end>")
    first, *others = level_ids("😀".encode())
    assert "".join(taken_of(LEVEL, [first, *[end] * 50, *others])) == "😀"
    assert "".join(
        taken_of(LEVEL, [first, end, *others], skip_special_tokens=False)
    ) == LEVEL.decode([first, end, *others], skip_special_tokens=False)


# what ends a text


def ids_of(text):
    return TINY.encode(text).ids


@pytest.mark.parametrize(("keep", "text"), [(False, "x = 1"), (True, "x = 1<|im_end|>")])
@pytest.mark.parametrize("through", ["eos_ids", "stop_token_ids"])
def test_an_end_token_ends_the_text_and_is_not_in_it(keep, text, through):
    params = {"skip_special_tokens": False, "no_stop_trim": keep}
    stream = TextStream(
        TINY,
        SamplingParams(**params, stop_token_ids=[2] if through == "stop_token_ids" else None),
        [2] if through == "eos_ids" else [],
    )
    reasons = [stream.push(token) for token in [*ids_of("x = 1"), 2]]
    assert reasons[-1] == {"type": "stop", "matched": 2} and not any(reasons[:-1])
    assert stream.take() == text and stream.tokens == len(reasons)


def test_ignore_eos_ignores_the_model_s_ends_only():
    stream = TextStream(TINY, SamplingParams(ignore_eos=True, stop_token_ids=[3]), [2])
    assert stream.push(2) is None
    assert stream.push(3) == {"type": "stop", "matched": 3}


def test_nothing_ends_before_min_new_tokens():
    stream = TextStream(TINY, SamplingParams(min_new_tokens=2, stop="a"), [2])
    (a,) = ids_of("a")
    assert [stream.push(token) for token in (2, a)] == [None, None]
    assert stream.take() == "a"
    assert stream.push(a) == {"type": "stop", "matched": "a"}
    assert stream.text == "a"


def test_a_stop_string_that_ends_after_min_new_tokens_may_begin_before():
    stream = TextStream(LEVEL, SamplingParams(min_new_tokens=2, stop="stop"))
    for token in level_ids(b"sto"):
        assert stream.push(token) is None
    assert stream.take() == ""
    assert stream.push(*level_ids(b"p")) == {"type": "stop", "matched": "stop"}
    assert stream.text == ""


def test_the_length_ends_the_text_with_all_that_was_held():
    stream = TextStream(LEVEL, SamplingParams(max_new_tokens=3, stop="stop"))
    first, second, third = level_ids(b"sto")
    assert stream.push(first) is stream.push(second) is None
    assert stream.push(third) == {"type": "length", "length": 3}
    assert stream.take() == "sto" and stream.finish() == ""
    assert (
        stream.push(first) == {"type": "length", "length": 3}
        and stream.text == "sto"
        and stream.tokens == 3
    )


def test_a_stop_at_the_last_token_is_a_stop():
    stream = TextStream(LEVEL, SamplingParams(max_new_tokens=100), [5], max_new_tokens=1)
    assert stream.push(5) == {"type": "stop", "matched": 5}
    assert TextStream(LEVEL, SamplingParams(max_new_tokens=100), max_new_tokens=1).push(5) == {
        "type": "length",
        "length": 1,
    }


def test_an_abort_gives_what_was_held_and_its_reason():
    stream = TextStream(LEVEL, SamplingParams(stop="stop"))
    stream.push(level_ids(b"s")[0])
    assert stream.take() == ""
    assert stream.finish({"type": "abort", "message": "gone"}) == "s"
    assert stream.reason == {"type": "abort", "message": "gone"}


def test_without_a_tokenizer_there_are_ids_only():
    stream = TextStream(None, SamplingParams(max_new_tokens=3, stop="a"), [9])
    assert stream.push(1) is None and stream.take() == ""
    assert stream.push(9) == {"type": "stop", "matched": 9}
    assert stream.finish() == stream.text == ""


def test_the_text_continues_its_context():
    the = FALLBACK.token_to_id("▁the")
    stream = TextStream(FALLBACK, SamplingParams(), context=[1, FALLBACK.token_to_id("a")])
    stream.push(the)
    assert stream.take() == " the"
    for context in ([], [1], [BYTE[0xE4]]):  # nothing there to continue
        stream = TextStream(FALLBACK, SamplingParams(), context=context)
        stream.push(the)
        assert stream.finish() == "the"


def test_a_token_costs_microseconds():
    ids = ids_of((ROOT / "qtool" / "errors.py").read_text())
    best = 1.0
    for _ in range(5):
        stream = TextStream(
            TINY,
            SamplingParams(max_new_tokens=None, stop=["\n\n\n\n", "<|im_end|>", "Observation:"]),
            [0],
        )
        start = time.perf_counter()
        for token in ids:
            stream.push(token)
        best = min(best, (time.perf_counter() - start) / len(ids))
    assert best < 50e-6  # about 3 on an idle machine
