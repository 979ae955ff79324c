"""lm-eval on our engine in process: its scores are those of lm-eval's own `hf` on the same weights."""

from __future__ import annotations

import math

import pytest
from support import EXAMPLE
from support.lm_eval_tasks import NAMES, QUESTIONS, task_folder

from qtool.errors import UsageError
from qtool.evaluation.harness import KnownTasks, TaskScore, find_tasks, recovery, run_tasks

pytest_plugins = ["support.sample_plugin"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with task_folder(tmp_path_factory.mktemp("tasks")) as folder:
        yield folder


@pytest.fixture(scope="module")
def ours(folder, one_thread):
    return run_tasks(EXAMPLE, NAMES, task_folder=folder, device="cpu", dtype="float32")


@pytest.mark.slow
def test_scores_are_those_of_lm_evals_own_hf_model(ours, folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(EXAMPLE), "dtype": "float32"},
        device="cpu",
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=1000,
    )["results"]
    assert [score.task for score in ours] == [NAMES[0], *NAMES]
    for score in ours:
        expected = theirs[score.task]
        assert score.documents == len(QUESTIONS)
        assert score.value == pytest.approx(expected[f"{score.metric},none"], rel=1e-4)
        stderr = expected[f"{score.metric}_stderr,none"]
        assert score.stderr == (None if stderr == "N/A" else pytest.approx(stderr, rel=1e-3))
    assert {score.value for score in ours if score.metric == "acc"} - {0.0, 1.0}


@pytest.mark.slow
def test_values_of_documents_are_kept_where_the_score_is_their_mean(ours):
    kept = {score.metric: len(score.by_document) for score in ours}
    assert kept == {"acc": 5, "acc_norm": 5, "exact_match": 5, "word_perplexity": 0}
    assert [score.higher_is_better for score in ours] == [True, True, True, False]


def test_prompts_may_be_chats_and_documents_a_few(folder):
    (found,) = run_tasks(
        EXAMPLE, ["tiny_write"], 2, chat_template=True, task_folder=folder, device="cpu"
    )
    assert (found.task, found.documents, found.stderr is not None) == ("tiny_write", 2, True)


def test_an_unknown_task_is_refused_with_the_nearest(folder):
    with pytest.raises(UsageError, match="unknown task `tiny_choise`") as caught:
        run_tasks(EXAMPLE, ["tiny_choise"], task_folder=folder)
    assert caught.value.code == "E_TASK"
    assert "tiny_choice" in caught.value.hint


def test_which_tasks_get_a_score_is_known_before_they_run():
    known = KnownTasks(["gsm8k"], has_groups=False)
    assert known.may_score("gsm8k") and not known.may_score("gsm8")
    assert KnownTasks(["mmlu"], has_groups=True).may_score("mmlu_anatomy")
    assert not find_tasks([]).may_score("gsm8k")


def score(values, *, stderr=None, up=True, keep=True):
    mean = sum(values) / len(values)
    documents = {("task", number): value for number, value in enumerate(values)}
    return TaskScore("task", "m", mean, stderr, up, len(values), documents if keep else {})


def test_recovery_is_the_ratio_with_the_error_of_the_differences():
    base, quantized = score([1, 1, 0, 1]), score([1, 0, 0, 1])
    found = recovery(base, quantized)
    rest = [1 - 2 / 3, -2 / 3, 0, 1 - 2 / 3]
    spread = math.sqrt(sum(one**2 for one in rest) / 3)
    assert (found.paired, found.value) == (True, pytest.approx(2 / 3))
    assert found.stderr == pytest.approx(spread / 2 / 0.75)
    assert recovery(base, base).stderr == 0


def test_recovery_of_what_should_be_low_and_of_nothing():
    base, quantized = (score([value], stderr=0.1, up=False, keep=False) for value in (2.0, 4.0))
    found = recovery(base, quantized)
    assert (found.value, found.paired) == (0.5, False)
    assert found.stderr == pytest.approx(math.hypot(0.1, 0.05) / 4)
    assert recovery(score([0, 0]), score([1, 0])).value is None
