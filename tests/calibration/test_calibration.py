import json
import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict, replace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from qtool.calibration import CalibrationSpec, check_source
from qtool.calibration import load_calibration as load_from_steps
from qtool.calibration.reading import Reading
from qtool.calibration.samples import check_records
from qtool.errors import DataRefused, UsageError

MODEL = ROOT / "examples" / "tiny-python-llama"
EXAMPLE = MODEL / "calibration.jsonl"
VOCAB = 4096
LONG = "the quick brown fox jumps over the lazy dog " * 4


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def write(tmp_path):
    """Write records to a file of tmp_path in the format of its suffix and return a spec for it."""

    def write(name, records, **options):
        path = tmp_path / name
        if isinstance(records, bytes):
            path.write_bytes(records)
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            path.write_text(json.dumps(records))
        return CalibrationSpec(str(path), **options)

    return write


def load_calibration(spec, tokenizer, vocab_size):
    """Do in this process what `isolated_tokenizing` does in another."""
    return load_from_steps(spec, Reading(spec, tokenizer, vocab_size))


def check(spec):
    check_records(spec, Reading(spec))


def refusal(spec, tokenizer=None):
    """Return the error of the check, or with a tokenizer of the load; every one has a hint and
    names the file.
    """
    with pytest.raises(DataRefused) as caught:
        load_calibration(spec, tokenizer, VOCAB) if tokenizer else check(spec)
    assert caught.value.hint
    assert spec.source in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


def run_python(code, **env):
    """Run code in a fresh interpreter and return what it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def texts_of(result, tokenizer):
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in result.samples]


# What the samples are


def test_example_is_truncated_and_counted(tokenizer):
    result = load_calibration(CalibrationSpec(str(EXAMPLE), seq_len=128), tokenizer, VOCAB)
    report = result.report
    assert len(result.samples) == report.used == 27
    assert report.truncated == sum(len(ids) == 128 for ids in result.samples) > 20
    assert report.tokens == sum(map(len, result.samples))
    assert report.dropped == 0
    assert report.source == str(EXAMPLE)


def test_same_seed_gives_the_same_samples_and_another_seed_does_not(tokenizer):
    spec = CalibrationSpec(str(EXAMPLE), seq_len=64, num_samples=9, seed=3)
    first, again, other = (
        load_calibration(s, tokenizer, VOCAB) for s in (spec, spec, replace(spec, seed=4))
    )
    assert first == again
    assert first.report.digest != other.report.digest
    assert len(first.report.digest) == 64


def test_more_samples_begin_with_the_same_samples(tokenizer):
    few, many = (
        load_calibration(CalibrationSpec(str(EXAMPLE), seq_len=32, num_samples=n), tokenizer, VOCAB)
        for n in (4, 12)
    )
    assert many.samples[:4] == few.samples


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet"])
def test_every_record_is_drawn_once_and_not_in_file_order(write, tokenizer, name):
    records = [{"text": f"record {i:02d} {LONG}"} for i in range(40)]
    texts = texts_of(load_calibration(write(name, records), tokenizer, VOCAB), tokenizer)
    assert sorted(texts) == [record["text"] for record in records]
    assert texts != sorted(texts)


def test_formats_with_the_same_records_give_the_same_samples(write, tokenizer):
    records = [{"text": f"record {i:02d} {LONG}", "id": i} for i in range(30)]
    digests = {
        load_calibration(write(name, records, num_samples=5), tokenizer, VOCAB).report.digest
        for name in ("a.jsonl", "a.json", "a.parquet")
    }
    assert len(digests) == 1


def test_text_file_gives_its_paragraphs(write, tokenizer):
    spec = write("data.txt", f"one {LONG}\nmore of one\n\n \t\n\ntwo {LONG}\r\n\r\n".encode())
    assert sorted(texts_of(load_calibration(spec, tokenizer, VOCAB), tokenizer)) == [
        f"one {LONG}\nmore of one",
        f"two {LONG}",
    ]


def test_text_file_without_blank_lines_still_gives_many_samples(write, tokenizer):
    spec = write(
        "data.txt",
        b"".join(b"%07d all work and no play makes this a long file\n" % i for i in range(60_000)),
        seq_len=16,
    )
    assert load_calibration(spec, tokenizer, VOCAB).report.used == 3


def test_json_lines_under_a_json_name_and_a_list_inside_an_object_are_read(write, tokenizer):
    records = [{"text": f"{i} {LONG}"} for i in range(4)]
    lines = "\n".join(map(json.dumps, records)).encode()
    digests = {
        load_calibration(spec, tokenizer, VOCAB).report.digest
        for spec in (
            write("a.json", lines),
            write("b.json", {"version": 1, "data": records}),
            write("c.json", records),
        )
    }
    assert len(digests) == 1


def test_one_json_object_is_one_record(write, tokenizer):
    assert (
        load_calibration(
            write("a.json", {"text": LONG, "tags": ["a"]}), tokenizer, VOCAB
        ).report.used
        == 1
    )


def test_byte_order_mark_and_blank_lines_are_skipped(write, tokenizer):
    spec = write("a.jsonl", b"\xef\xbb\xbf" + json.dumps({"text": LONG}).encode() + b"\r\n\r\n\n")
    assert texts_of(load_calibration(spec, tokenizer, VOCAB), tokenizer) == [LONG]


def test_short_and_null_texts_are_dropped_and_counted(write, tokenizer):
    spec = write("a.jsonl", [{"text": "short"}, {"text": ""}, {"text": None}, {"text": LONG}])
    report = load_calibration(spec, tokenizer, VOCAB).report
    assert (report.used, report.dropped) == (1, 3)


def test_text_with_far_more_than_the_wanted_tokens_gives_its_exact_beginning(write, tokenizer):
    words = " ".join(f"word{i}" for i in range(3000))
    # a cut after 16 characters a token is all blanks: it must be widened
    blanks = " " * 9000 + words
    for text in (words, blanks):
        [ids] = load_calibration(
            write("a.json", [{"text": text}], seq_len=100), tokenizer, VOCAB
        ).samples
        assert list(ids) == tokenizer(text)["input_ids"][:100]


# Fields


def test_messages_go_through_the_chat_template(write, tokenizer):
    chat = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": LONG}]
    expected = tokenizer.apply_chat_template(chat, return_dict=False)
    for name in ("a.jsonl", "a.parquet"):
        [ids] = load_calibration(write(name, [{"messages": chat}]), tokenizer, VOCAB).samples
        assert list(ids) == expected


def test_prompt_and_completion_are_joined_as_text_or_as_a_conversation(write, tokenizer):
    [ids] = load_calibration(
        write("a.jsonl", [{"prompt": "def f(x):", "completion": f" return {LONG}"}]),
        tokenizer,
        VOCAB,
    ).samples
    assert tokenizer.decode(ids) == f"def f(x): return {LONG}"
    chat = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": LONG}]
    [ids] = load_calibration(
        write("b.jsonl", [{"prompt": chat[:1], "completion": chat[1:]}]), tokenizer, VOCAB
    ).samples
    assert list(ids) == tokenizer.apply_chat_template(chat, return_dict=False)


def test_input_ids_pass_as_they_are_without_their_padding(write, tokenizer):
    ids = list(range(100, 130))
    for name in ("a.jsonl", "a.parquet"):
        spec = write(
            name,
            [{"text": LONG, "input_ids": [0, 0, *ids], "attention_mask": [0, 0] + [1] * 30}],
            seq_len=20,
        )
        assert load_calibration(spec, tokenizer, VOCAB).samples == (tuple(ids[:20]),)


@pytest.mark.parametrize(
    ("present", "used"),
    [
        ({"text", "prompt", "completion"}, "prompt"),
        ({"text", "prompt"}, "text"),
        ({"text", "body"}, "body"),
        ({"text", "prompt", "completion", "messages"}, "messages"),
    ],
)
def test_field_that_comes_first_is_used(write, tokenizer, present, used):
    record = {name: f"{name} {LONG}" for name in present}
    if "messages" in present:
        record["messages"] = [{"role": "user", "content": f"messages {LONG}"}]
    spec = write("a.jsonl", [record], text_column="body" if "body" in present else None)
    [text] = texts_of(load_calibration(spec, tokenizer, VOCAB), tokenizer)
    assert f"{used} the quick" in text


def test_tokenizer_is_left_as_it_was(write, tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    load_calibration(CalibrationSpec(str(EXAMPLE), seq_len=64), tokenizer, VOCAB)
    load_calibration(
        write("a.json", [{"messages": [{"role": "user", "content": LONG}]}], pack=True),
        tokenizer,
        VOCAB,
    )
    assert tokenizer.backend_tokenizer.to_str() == before


def test_spec_travels_as_json():
    spec = CalibrationSpec("a.jsonl", "body", pack=True)
    assert CalibrationSpec(**json.loads(json.dumps(asdict(spec)))) == spec


# Packing


def test_packed_samples_are_full_but_the_last(tokenizer):
    result = load_calibration(
        CalibrationSpec(str(EXAMPLE), seq_len=300, pack=True), tokenizer, VOCAB
    )
    assert {len(ids) for ids in result.samples[:-1]} == {300}
    assert result.report.truncated == 0
    few = load_calibration(
        CalibrationSpec(str(EXAMPLE), seq_len=300, pack=True, num_samples=7), tokenizer, VOCAB
    )
    assert few.samples == result.samples[:7]


id_lists = st.lists(st.lists(st.integers(1, VOCAB - 1), max_size=40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lists=id_lists, seq_len=st.integers(11, 50), seed=st.integers(0, 99))
def test_packing_keeps_all_tokens_in_order_with_one_separator_between_texts(
    tmp_path_factory, tokenizer, lists, seq_len, seed
):
    path = tmp_path_factory.mktemp("pack") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in lists))
    if sum(map(len, lists)) < 11:
        return
    spec = CalibrationSpec(str(path), seq_len=seq_len, seed=seed, pack=True)
    check(spec)
    result = load_calibration(spec, tokenizer, VOCAB)
    joined = [token for ids in result.samples for token in ids]
    texts = [ids for ids in lists if ids]
    total = sum(map(len, texts)) + len(texts) - 1
    rest = total % seq_len
    assert len(joined) == total - (rest if rest < 11 else 0) == result.report.tokens
    assert result.report.dropped == len(lists) - len(texts) + (0 < rest < 11)
    assert all(len(ids) == seq_len for ids in result.samples[:-1])
    wanted = ["".join(map(chr, ids)) for ids in texts]
    # ids are above 0, the separator is 0
    found = "".join(map(chr, joined)).split(chr(tokenizer.eos_token_id))
    assert Counter(found[:-1]) <= Counter(wanted)
    assert any(text.startswith(found[-1]) for text in wanted)


@settings(max_examples=60, deadline=None)
@given(
    lists=id_lists,
    seq_len=st.integers(11, 50),
    num_samples=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_samples_are_beginnings_of_texts_and_the_counts_add_up(
    tmp_path_factory, tokenizer, lists, seq_len, num_samples, seed
):
    path = tmp_path_factory.mktemp("cut") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in lists))
    spec = CalibrationSpec(str(path), seq_len=seq_len, seed=seed, num_samples=num_samples)
    usable = [tuple(ids[:seq_len]) for ids in lists if len(ids) >= 11]
    if not usable:
        assert refusal(spec).code == refusal(spec, tokenizer).code == "E_DATA_USELESS"
        return
    check(spec)
    result = load_calibration(spec, tokenizer, VOCAB)
    assert len(result.samples) == min(num_samples, len(usable)) == result.report.used
    assert all(usable.count(ids) >= result.samples.count(ids) for ids in result.samples)
    assert result.report.used + result.report.dropped <= len(lists)


# Refusals


def test_missing_file_names_the_nearest_one(write):
    spec = write("calibration.jsonl", [{"text": LONG}])
    error = refusal(replace(spec, source=spec.source.replace("calibration", "calibratoin")))
    assert error.code == "E_DATA_MISSING"
    assert "did you mean `calibration.jsonl`" in error.hint


def test_relative_name_with_a_data_suffix_is_a_file_and_not_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(CalibrationSpec("data/calibration.jsonl")).code == "E_DATA_MISSING"


def test_folder_and_unknown_suffix_are_refused(tmp_path, write):
    assert "is a folder" in refusal(CalibrationSpec(str(tmp_path))).message
    assert refusal(write("data.pkl", b"\x80\x04.")).code == "E_DATA_FORMAT"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n\n"),
        ("a.json", b"[]"),
        ("a.txt", b"\n\n"),
        ("a.parquet", b""),
        ("a.json", b'{"data": []}'),
    ],
)
def test_empty_files_are_refused(write, name, content):
    assert refusal(write(name, content)).code == "E_DATA_EMPTY"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zeros.jsonl", b"\x00" * 100),
        ("utf16.txt", "hello there".encode("utf-16")),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1")),
        ("a.parquet", b"this is no parquet file"),
        ("cut.parquet", b"PAR1" + b"\x00" * 50 + b"\xff\xff\xff\x7fPAR1"),
    ],
)
def test_binary_and_broken_files_are_refused(write, name, content):
    assert refusal(write(name, content)).code == "E_DATA_BINARY"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (b"{oops", "E_DATA_LINE", "not JSON"),
        (b"[1, 2]", "E_DATA_LINE", "found a list"),
        (b'"text"', "E_DATA_LINE", "found a string"),
        (b"[" * 100_000, "E_DATA_LINE", "not JSON"),
        (b'{"text": 5}', "E_DATA_FIELD", "`text` is a number; expected a string"),
        (b'{"text": "\\ud800 alone"}', "E_DATA_FIELD", "surrogate"),
        (b'{"text": "caf\xe9"}', "E_DATA_BINARY", "0xe9"),
        (b'{"messages": "hi"}', "E_DATA_FIELD", "`messages` is a string"),
        (b'{"messages": []}', "E_DATA_FIELD", "`messages` is an empty list"),
        (b'{"messages": [{"content": "hi"}]}', "E_DATA_FIELD", "`messages[0]` is not a message"),
        (
            b'{"messages": [{"role": "user", "content": 3}]}',
            "E_DATA_FIELD",
            "`messages[0].content` is a number",
        ),
        (b'{"prompt": "a", "completion": ["b"]}', "E_DATA_FIELD", "`completion` is a list"),
        (b'{"input_ids": "1 2 3"}', "E_DATA_FIELD", "`input_ids` is a string"),
        (b'{"input_ids": [1, 2.5]}', "E_DATA_FIELD", "`input_ids[1]` is 2.5"),
        (b'{"input_ids": [1, true]}', "E_DATA_FIELD", "`input_ids[1]` is true"),
        (b'{"input_ids": [-1]}', "E_DATA_FIELD", "`input_ids[0]` is -1"),
        (b'{"input_ids": [1, 2], "attention_mask": [1]}', "E_DATA_FIELD", "`attention_mask`"),
    ],
)
def test_bad_line_is_refused_with_its_number_by_check_and_load(write, tokenizer, line, code, said):
    good = json.dumps({"text": LONG}).encode()
    spec = write("a.jsonl", b"\n".join([good, b"", good, line, good]))
    for error in (refusal(spec), refusal(spec, tokenizer)):
        assert error.code == code
        assert f"{spec.source}, line 4: " in error.message
        assert said in error.message


def test_broken_json_names_its_line_and_a_wrong_item_its_place(write):
    assert ", line 3: " in refusal(write("a.json", b'[\n{"text": "a"},\n{"text" "b"}\n]')).message
    assert (
        ", item 2: expected a JSON object; found a number"
        in refusal(write("b.json", [{"text": LONG}, 7])).message
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_missing_text_field_lists_the_fields_found_and_hints_at_one(write, name):
    error = refusal(write(name, [{"id": 3, "body": LONG}]))
    assert error.code == "E_DATA_FIELD"
    assert "it has `id`, `body`" in error.message
    assert "--text-column body" in error.hint
    error = refusal(write(name, [{"id": 3, "body": LONG, "text": LONG}], text_column="boby"))
    assert "no field `boby`; it has `id`, `body`, `text`" in error.message
    assert "did you mean `body`" in error.hint


@pytest.mark.parametrize("pack", [False, True])
def test_useless_set_names_its_longest_record(write, tokenizer, pack):
    spec = write("a.jsonl", [{"text": ""}, {"text": "a b c"}, {"text": "x"}], pack=pack)
    for error in (refusal(spec), refusal(spec, tokenizer)):
        assert error.code == "E_DATA_USELESS"
        assert ", line 2: " in error.message


def test_input_ids_outside_the_vocabulary_are_refused(write, tokenizer):
    spec = write("a.jsonl", [{"input_ids": [1] * 20}, {"input_ids": [VOCAB] * 20}])
    check_source(spec)  # the vocabulary is not known yet
    error = refusal(spec, tokenizer)
    assert error.code == "E_DATA_VOCAB"
    assert "line 2: token id 4096 is outside" in error.message


def test_messages_without_a_template_or_against_it_are_refused(write):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    spec = write("a.jsonl", [{"messages": [{"role": "user", "content": LONG}]}])
    tokenizer.chat_template = None
    assert "has none" in refusal(spec, tokenizer).message
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    error = refusal(spec, tokenizer)
    assert error.code == "E_DATA_TEMPLATE"
    assert "line 1: the chat template refuses these messages: roles must alternate" in error.message


@pytest.mark.parametrize("option", [{"num_samples": 0}, {"seq_len": 10}, {"batch_size": 0}])
def test_numbers_too_small_to_calibrate_with_are_refused(option):
    with pytest.raises(UsageError, match="the least is"):
        CalibrationSpec("a.jsonl", **option)


def test_unreadable_file_is_refused(write):
    assert refusal(CalibrationSpec("x" * 5000)).code == "E_DATA_MISSING"


# What is imported, and the Hub

TRY_HUB = """
from qtool.calibration import CalibrationSpec, check_source
from qtool.errors import QtoolError

def attempt(source):
    try:
        check_source(CalibrationSpec(source, num_samples=5))
        print("fine")
    except QtoolError as error:
        print(error.exit_code, error.code, error.message)
"""
FILL_CACHE = """
import datasets
from pathlib import Path

datasets.load_dataset("json", data_files={source!r})
[made] = Path({cache!r}).glob("json/*/*/*/dataset_info.json")
target = Path({cache!r}, "some-org___some-set", "default", *made.parent.parts[-2:])
target.parent.mkdir(parents=True)
made.parent.rename(target)
(target / "json-train.arrow").rename(target / "some-set-train.arrow")
"""


def test_checking_json_imports_no_heavy_library():
    code = f"""
        import sys
        from qtool.calibration import CalibrationSpec, check_source
        check_source(CalibrationSpec({str(EXAMPLE)!r}))
        print(*{{"torch", "transformers", "datasets", "pyarrow"}} & set(sys.modules))
    """
    assert run_python(code) == ""


def test_hub_without_network_is_refused_in_seconds():
    started = time.monotonic()
    said = run_python(
        TRY_HUB + "attempt('some-org/some-set')",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_OFFLINE="0",
    )
    assert said.startswith("4 E_HUB_UNREACHABLE `some-org/some-set`")
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_hub_in_offline_mode_is_refused_unless_the_cache_has_it(tmp_path):
    fill_cache = FILL_CACHE.format(source=str(EXAMPLE), cache=str(tmp_path))
    code = f"{TRY_HUB}\nattempt('some-org/some-set')\n{fill_cache}\nattempt('some-org/some-set')\nattempt('some-org/some-set::nonsense')"
    absent, cached, wrong_split = run_python(
        code, HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path)
    ).splitlines()
    assert absent.startswith("4 E_HUB_UNREACHABLE")
    assert cached == "fine"
    assert wrong_split.startswith("3 E_DATA_HUB")
    assert "nonsense" in wrong_split
    assert "train" in wrong_split
