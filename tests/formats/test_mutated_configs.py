"""A changed quantization config ends in a right reading or a coded refusal, at once."""

import json
import random
import time

import pytest
import torch
from support.mutated_configs import mutations
from support.published import PUBLISHED

from qtool import formats
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.inspection import inspect, render
from qtool.weight import dequantize

SLOW_S = 2.0
LAYOUTS, EACH = 6, 10  # that every run tries
WITH_CONFIG = sorted(name for name in PUBLISHED if not name.startswith("gguf"))
ENGINES = ("vllm", "sglang")
OTHER_NUMBERS = " has other numbers"
# keys that say which numbers the same tensors mean
MEANING = {"backend", "checkpoint_format", "packing_format", "quant_method"}


def outcome(folder, expected, first):
    """What is wrong with how a mutated checkpoint is read or refused; empty when nothing is.

    ``first`` is the layout before.
    """
    try:
        checkpoint = open_checkpoint(folder)
        layout = formats.detect(checkpoint)
        for engine in ENGINES:
            render(inspect(checkpoint, engine=engine))
        if layout is None:
            return "taken for a model in 16 bits"
        changed = [name for name, own in layout.modules.items() if own != first.modules.get(name)]
        if missing := first.modules.keys() - layout.modules.keys():
            return f"layers are missing: {sorted(missing)[:2]}"
        for name in changed:
            found = dequantize(formats.read(checkpoint, layout, name))
            if not torch.equal(found, expected[name]):
                return f"`{name}`{OTHER_NUMBERS} as {layout.modules[name].scheme}"
    except CheckpointRefused as error:
        said = f"{error.message} {error.hint}"
        if not error.hint or "download" in said.lower():
            return f"a wrong hint: {error.code} {said}"
        return ""
    return ""


def wrong(name, tmp_path, chosen):
    """What goes wrong with some mutations of a layout."""
    folder = tmp_path / name
    expected = PUBLISHED[name](folder)
    first = formats.detect(open_checkpoint(folder))
    found = []
    for mutation in chosen(list(mutations(folder))):
        file = folder / mutation.file
        before = file.read_text()
        file.write_text(json.dumps(mutation.content))
        start = time.process_time()
        try:
            problem = outcome(folder, expected, first)
        except Exception as error:  # whatever it is: only refusals are right
            problem = f"{type(error).__name__}: {error}"
        if time.process_time() - start > SLOW_S:
            problem = problem or "too slow"
        is_meant = OTHER_NUMBERS in problem and not MEANING.isdisjoint(mutation.path)
        if problem and not is_meant:
            found.append(f"{mutation}: {problem}")
        file.write_text(before)
    return found


def test_a_slice_of_all_mutations_is_read_or_refused(tmp_path):
    chance = random.Random(0)
    names = chance.sample(WITH_CONFIG, LAYOUTS)
    found = {
        name: problems
        for name in names
        if (problems := wrong(name, tmp_path, lambda all: chance.sample(all, EACH)))
    }
    assert found == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WITH_CONFIG)
def test_every_mutation_is_read_or_refused(tmp_path, name):
    assert wrong(name, tmp_path, lambda all: all) == []
