"""`qtool eval`: numbers equal transformers' and a few lines of torch; gates decide as they say."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from support import EXAMPLE
from support.planted_faults import plant
from support.samples import load

import qtool
from qtool.checkpoint.part_costs import PartCost
from qtool.cli import output
from qtool.cli.app import run
from qtool.errors import CheckpointRefused, DataRefused, GateFailed, ResourceError, UsageError
from qtool.evaluation.agreement import Agreement
from qtool.evaluation.collapse import compare_answers, loops, net_share
from qtool.evaluation.gate import Measure, check_gate, default_gate, parse_gate
from qtool.evaluation.html_report import render_html
from qtool.evaluation.measures import measures_of
from qtool.evaluation.reference import ReferenceFile, as_stored, from_stored
from qtool.evaluation.report import ShownToken
from qtool.evaluation.text import render
from qtool.evaluation.texts import Document, TextSpec, Window, cut_windows, read_documents
from qtool.scheme import scheme_from

pytest_plugins = ["support.sample_plugin"]
pytestmark = pytest.mark.usefixtures("one_thread")

DATA = str(EXAMPLE / "evaluation.jsonl")
SMALL = {"data": DATA, "max_tokens": 1500, "seq_len": 256, "answers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def int8(sample, tmp_path_factory):
    """An int8 checkpoint of the bundled model, tokenizer included."""
    folder = tmp_path_factory.mktemp("int8") / "int8"
    shutil.copytree(sample("ct/W8A8"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder)
    return folder


def evaluate(model, **options):
    return qtool.evaluate(model, reference=EXAMPLE, **{**SMALL, **options})


@torch.inference_mode()
def test_perplexity_is_transformers_and_kl_a_few_lines_of_torch(sample):
    found = evaluate(sample("ct/W4A16"), dtype="float32", stride=160, max_tokens=900)
    texts = TextSpec(DATA, None, 900, 256, 160, 0)
    documents = read_documents(texts, EXAMPLE, 10**6)
    from qtool.evaluation.perplexity import load_dequantized

    models = [
        load(EXAMPLE, dtype=torch.float32),
        load_dequantized(qtool.checkpoint.open_checkpoint(sample("ct/W4A16")), dtype=torch.float32),
    ]
    losses, kls, same = [[], []], [], []
    for document in documents:  # as transformers' documentation measures perplexity
        before = 0
        for begin in range(0, len(document.ids), 160):
            end = min(begin + 256, len(document.ids))
            ids = torch.tensor([document.ids[begin:end]])
            labels = ids.clone()
            labels[:, : -(end - before)] = -100
            counted = (labels[0, 1:] != -100).nonzero()[:, 0]
            logs = []
            for model, total in zip(models, losses, strict=True):
                output = model(ids, labels=labels)
                total.append((float(output.loss) * len(counted), len(counted)))
                logs.append(output.logits[0, :-1].float().log_softmax(-1)[counted])
            kls.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
            same.append(logs[0].argmax(-1) == logs[1].argmax(-1))
            before = end
            if end == len(document.ids):
                break
    expected = [
        math.exp(sum(loss for loss, _ in total) / sum(count for _, count in total))
        for total in losses
    ]
    kl = torch.cat(kls)
    measures = {name: each.value for name, each in found.measures.items()}
    assert found.data.tokens == len(kl)
    assert measures["reference_ppl"] == pytest.approx(expected[0], rel=1e-4)
    assert measures["ppl"] == pytest.approx(expected[1], rel=1e-4)
    assert measures["mean_kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert measures["max_kl"] == pytest.approx(float(kl.max()), rel=1e-3)
    assert measures["median_kl"] == pytest.approx(float(np.median(kl)), rel=1e-3)
    assert measures["top1"] == pytest.approx(float(torch.cat(same).float().mean()))
    assert found.worst[0].kl == pytest.approx(float(kl.max()), rel=1e-3)
    assert found.model.schemes["W4A16"]


@given(
    sizes=some.lists(some.integers(2, 40), min_size=1, max_size=4),
    seq_len=some.integers(2, 20),
    data=some.data(),
)
def test_each_token_counts_once_after_as_much_context_as_there_is(sizes, seq_len, data):
    stride = data.draw(some.integers(1, seq_len))
    documents = [Document("", tuple(range(size))) for size in sizes]
    windows = cut_windows(documents, seq_len, stride)
    for number, document in enumerate(documents):
        counted = [
            window.start + place
            for window in windows
            if window.document == number
            for place in range(window.first, len(window.ids))
        ]
        assert counted == sorted(set(counted))
        assert all(
            window.ids == document.ids[window.start : window.start + seq_len]
            for window in windows
            if window.document == number
        )
        if stride < seq_len:
            assert counted == [*range(1, len(document.ids))]


@pytest.mark.exhaustive
def test_side_by_side_and_from_the_cache_are_the_same(int8, tmp_path):
    small = {"answers": 1, "max_tokens": 600}
    live = evaluate(int8, **small)
    first, again = (evaluate(int8, cache_dir=tmp_path / "cache", **small) for _ in range(2))
    assert (live.reference.runs_on, first.reference.runs_on) == ("engine", "engine")
    assert again.reference.runs_on == "stored"
    assert first.measures == again.measures
    for name, measure in live.measures.items():
        assert first.measures[name].value == pytest.approx(measure.value, rel=0.02, abs=1e-5)


def test_a_damaged_cache_is_refused_or_written_again(tmp_path):
    file = ReferenceFile(tmp_path / "cache" / "x.logprobs", 3, 50)
    file.check_output()
    stored = as_stored(torch.randn(3, 50) * 20)
    assert torch.allclose(from_stored(stored, file.path).exp().sum(-1), torch.ones(3))
    for number in (0, math.nan):
        with pytest.raises(ResourceError, match="does not hold log-probabilities"):
            from_stored(np.where(np.arange(3)[:, None] == 1, number, stored), file.path)
    file.write_answers([[5, 6]])
    assert file.read_answers(1) == [[5, 6]] and file.read_answers(2) is None
    for text in ("3", "null", "[", '[["x"]]', "[3]"):
        next((tmp_path / "cache").iterdir()).write_text(text)
        assert file.read_answers(1) is None
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write there"):
        ReferenceFile(tmp_path / "file" / "x.logprobs", 3, 50).check_output()
    huge = ReferenceFile(tmp_path / "cache" / "x.logprobs", 1 << 40, 1 << 10)
    with pytest.raises(ResourceError, match=r"need 2251\.80 TB"), huge.writing():
        pass
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x.answers.json"]


def test_a_sound_int8_model_passes_and_planted_faults_fail(int8, tmp_path, monkeypatch):
    monkeypatch.setattr("qtool.evaluation.execution.ANSWER_TOKENS", 64)  # instead of 200
    good = evaluate(int8, gate="default", answers=2)
    assert not good.failed, good.checks
    for fault in ("scales_doubled", "other_tokenizer"):  # tests/benchmarks/gate.py: all, 20 times
        found = evaluate(plant(int8, fault, tmp_path / fault), gate="default")
        assert found.failed, fault
        assert bool(found.faults) == (fault == "other_tokenizer")


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not measured"):
        evaluate(EXAMPLE, gate="mean_k<=1")
    with pytest.raises(UsageError, match="--tasks"):
        evaluate(EXAMPLE, gate="speedup@16>=1")
    with pytest.raises(UsageError, match="names no task"):
        evaluate(EXAMPLE, tasks=" ,")
    for name, value in {"strict": True, "task_limit": 3}.items():
        with pytest.raises(UsageError, match=f"{name} has a meaning only with"):
            evaluate(EXAMPLE, **{name: value})
    with pytest.raises(UsageError, match="stride is 300"):
        evaluate(EXAMPLE, stride=300)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(CheckpointRefused):
        qtool.evaluate(EXAMPLE, reference=other, **SMALL)


def test_limits_are_parsed_and_judged():
    limits = parse_gate(["default", "mean_kl <= 0.5", "task:gsm8k.recovery>=0.9"], [])
    assert [str(each) for each in limits if each.name == "mean_kl"] == ["mean_kl<=0.5"]
    assert [str(each) for each in limits if each.name.startswith("task")] == [
        "task:gsm8k.recovery>=0.9"
    ]
    for wrong in ("mean_kl", "mean_kl<=x", "mean_kl<=nan", "<=1", "speed>=1"):
        with pytest.raises(UsageError):
            parse_gate([wrong], [])
    measures = {"top1": Measure(0.95, 0.93, 0.97)}
    verdicts = [
        check_gate(parse_gate([f"top1>={limit}"], []), measures, strict=strict)[0].verdict
        for strict in (False, True)
        for limit in (0.92, 0.94, 0.96, 0.98)
    ]
    assert verdicts == [
        *("pass", "pass", "fail", "fail"),
        *("pass", "inconclusive", "inconclusive", "fail"),
    ]
    nan = check_gate(parse_gate(["top1>=0.5"], []), {"top1": Measure(math.nan)}, strict=False)
    assert nan[0].verdict == "fail"


def test_default_limits_follow_the_scheme():
    limits = {
        name: next(each.value for each in default_gate([scheme_from(name)]) if each.name == "top1")
        for name in ("FP8_DYNAMIC", "W8A8", "W4A16", "NVFP4", "MXFP4")
    }
    assert limits["FP8_DYNAMIC"] == limits["W8A8"] > limits["W4A16"] > limits["NVFP4"]
    assert limits["NVFP4"] > limits["MXFP4"]
    mixed = default_gate([scheme_from("W8A8"), scheme_from("MXFP4")])
    assert mixed == default_gate([scheme_from("MXFP4")])


def test_a_logit_that_is_not_a_number_fails_the_gate():
    window = Window(0, 0, (1, 2, 3), 1)
    logits = torch.zeros(2, 5)
    broken = logits.clone()
    broken[1, 2] = math.nan
    agreement = Agreement()
    agreement.add([window], logits, broken, is_log=False)
    measures = measures_of(agreement)
    checks = check_gate(parse_gate(["mean_kl<=1", "ppl_ratio<=2"], []), measures, strict=False)
    assert {check.verdict for check in checks} == {"fail"}
    assert math.isnan(agreement.worst_tokens()[0].kl)


def test_equal_models_differ_nowhere_and_what_the_reference_rules_out_adds_nothing():
    agreement = Agreement()
    for size in (12, 6, 3):  # many positions are equal: none of them is worse than another
        windows = [Window(0, 0, tuple(range(size + 1)), 1)]
        logits = torch.zeros(size, 20)
        logits[:, 19] = -math.inf
        agreement.add(windows, logits, logits, is_log=False)
    assert measures_of(agreement)["max_kl"].value == 0
    assert len(agreement.worst_tokens()) == 20


def test_loops_and_sudden_ends_are_found():
    talk = list(range(200))
    assert not loops(talk) and not loops([1, 2] * 10)
    assert loops(talk + [7] * 60) and loops(talk + [1, 2, 3] * 30)
    found = compare_answers(
        [[0]] * 4,
        [talk, talk, [5] * 200, talk],
        [talk, [5] * 200, [5] * 200, [1, 2]],
    )
    assert [(each.kind, each.of_reference) for each in found] == [
        ("loop", False),
        ("sudden end", False),
    ]
    assert net_share(found, 4) == 0.5


def test_the_command_reports_and_ends_with_7(int8, tmp_path, monkeypatch):
    summary, junit, shown = tmp_path / "summary.md", tmp_path / "gate.xml", io.StringIO()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setattr(output, "_outcome", output.Outcome(shown))
    with pytest.raises(GateFailed) as failed:
        run(
            [
                *("eval", "--model-path", str(int8), "--reference", str(EXAMPLE), "--data", DATA),
                *("--max-tokens", "400", "--seq-len", "128", "--answers", "0", "--device", "cpu"),
                *("--gate", "default", "--gate", "mean_kl<=1e-9", "--junit", str(junit), "--json"),
            ]
        )
    assert (failed.value.code, failed.value.exit_code) == ("E_GATE_FAILED", 7)
    report = json.loads(shown.getvalue())
    assert report["passed"] is False
    assert [each["limit"] for each in report["checks"] if each["verdict"] == "fail"] == [
        "mean_kl<=1e-09"
    ]
    suite = ElementTree.fromstring(junit.read_text())
    assert suite.get("failures") == "1" and len(suite.findall("testcase")) == len(report["checks"])
    assert "gate failed" in summary.read_text()


@pytest.fixture
def gated(tmp_path):
    """Options of a run with a gate on two short texts."""
    texts = tmp_path / "texts.jsonl"
    lines = (EXAMPLE / "evaluation.jsonl").read_text().splitlines()[:2]
    cut = [{"text": json.loads(line)["text"][:800]} for line in lines]
    texts.write_text("\n".join(map(json.dumps, cut)))
    return {
        "method": "fp8_dynamic",
        "output": tmp_path / "out",
        "device": "cpu",
        "gate_data": str(texts),
    }


@pytest.mark.slow
def test_quantize_leaves_nothing_that_fails_its_gate(gated):
    with pytest.raises(GateFailed, match="mean_kl<=1e-09") as error:
        qtool.quantize(EXAMPLE, gate="mean_kl<=1e-9", **gated)
    assert "_proj (" in error.value.hint and "dB" in error.value.hint
    assert not gated["output"].exists()


@pytest.mark.exhaustive
def test_quantize_keeps_what_passes_or_is_wanted_all_the_same(gated):
    output = gated["output"]
    with pytest.raises(GateFailed):
        qtool.quantize(EXAMPLE, gate="mean_kl<=1e-9", keep_failed=True, **gated)
    assert json.loads((output / "qtool-manifest.json").read_text())["evaluation"]["gate"]
    result = qtool.quantize(EXAMPLE, gate=("default",), overwrite=True, **gated)
    assert "gate pass: mean_kl<=0.02" in result.summary()
    kept = json.loads((output / "qtool-manifest.json").read_text())["evaluation"]
    assert kept["measures"]["mean_kl"]["value"] == result.evaluation["measures"]["mean_kl"]["value"]
    assert "KL divergence, mean" in (output / "README.md").read_text()


def test_a_gate_is_checked_before_the_run(tmp_path):
    options = {"method": "fp8_dynamic", "output": tmp_path / "out", "device": "cpu"}
    with pytest.raises(UsageError, match="texts to measure on"):
        qtool.quantize(EXAMPLE, gate="mean_kl<=1", **options)
    with pytest.raises(UsageError, match="not measured"):
        qtool.quantize(EXAMPLE, gate="speedup@1>=1", gate_data=DATA, **options)
    with pytest.raises(DataRefused):
        qtool.quantize(EXAMPLE, gate="default", gate_data=str(tmp_path / "no.jsonl"), **options)
    with pytest.raises(UsageError, match="keep_failed has a meaning only with a gate"):
        qtool.quantize(EXAMPLE, keep_failed=True, **options)
    assert not list(tmp_path.iterdir())


def test_a_run_whose_result_could_not_be_measured_is_refused_before_it(tmp_path, tiny_copy):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"input_ids": [5, 6, 99_999] * 9}))
    options = {"method": "fp8_dynamic", "output": tmp_path / "out", "device": "cpu"}
    options |= {"gate": "default", "gate_data": str(texts)}
    with pytest.raises(DataRefused, match="vocabulary of 4096"):
        qtool.quantize(EXAMPLE, **options)
    config = json.loads((tiny_copy / "config.json").read_text())
    config["architectures"] = ["LlamaModel"]
    (tiny_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointRefused, match="does not continue a text"):
        qtool.quantize(tiny_copy, **{**options, "gate_data": DATA})
    assert not (tmp_path / "out").exists()


def test_the_layer_that_was_broken_costs_most(int8, tmp_path):
    broken = plant(int8, "layer_of_zeros", tmp_path / "broken")
    found = evaluate(broken, by_layer="modules", max_tokens=300)
    assert found.by_layer[0].part == "model.layers.2.self_attn.o_proj"
    assert found.by_layer[0].mean_kl > 10 * found.by_layer[1].mean_kl
    page = render_html(found)
    assert "KL divergence by layer" in page and "model.layers.2.self_attn.o_proj" in page


def test_the_page_escapes_what_files_say(int8):
    found = evaluate(int8, max_tokens=300)
    hostile = ShownToken(1.0, "x", 1, "<script>a</script>", "</td>", "<b>", 0.5, "\x1b[31m", 0.1)
    page = render_html(dataclasses.replace(found, worst=[hostile], faults=["<i>"]))
    assert "<script>" not in page and "<b>" not in page and "<i>" not in page
    assert "&lt;script&gt;" in page
    nan = dataclasses.replace(
        found, measures={"ppl": Measure(math.nan)}, by_layer=(PartCost("[/x]", math.nan, ("FP8",)),)
    )
    json.dumps(nan.for_manifest(), allow_nan=False)
    assert "NaN" in render_html(nan) and render(nan)
