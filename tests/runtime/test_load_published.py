"""Published layouts load as the model that their publishers mean."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.published import PUBLISHED

import qtool
from qtool.checkpoint import open_checkpoint
from qtool.formats import detect

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 512
FEW = (  # those that were once refused or read wrongly
    "awq-without-version",
    "g_idx-of-minus-one",
    "intel-int2-mixed-autoround",
    "intel-int4-autoround-awq",
    "llm-compressor-embedding-alone",
    "minimax-m3-w4a16-embedding",
)
# transformers has not these architectures, or not in this size
NOT_RUN = re.compile("moonshot|deepseek-v4")
OTHERS = sorted(name for name in PUBLISHED if name not in FEW and not NOT_RUN.search(name))


def dense_model(folder, expected):
    """The same model without quantization, made of what its publisher means."""
    from transformers import AutoModelForCausalLM

    tensors = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.rpartition(".")[0] not in expected
    }
    tensors |= {f"{name}.weight": weight.contiguous() for name, weight in expected.items()}
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.endswith("ion_config")}
    dense = folder.with_name("dense")
    dense.mkdir()
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    (dense / "config.json").write_text(json.dumps(kept))
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    shutil.rmtree(dense)
    return model


def error_of(name, tmp_path):
    expected = PUBLISHED[name](tmp_path / "model")
    with torch.inference_mode():
        wanted = dense_model(tmp_path / "model", expected)(TOKENS).logits
        found = qtool.load(tmp_path / "model", device="cpu", dtype="float32")(TOKENS).logits
    return float((found - wanted).norm() / wanted.norm())


def most(folder):
    """How far rounded inputs may take the logits: none, of 8 bits, of 4 bits."""
    modules = detect(open_checkpoint(folder)).modules.values()
    formats = {module.scheme.activations.format for module in modules if module.scheme.activations}
    return 0.3 if "fp4" in formats else 0.1 if formats else 1e-5


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in OTHERS)]
)
def test_logits_are_those_of_the_dequantized_model(tmp_path, name):
    assert error_of(name, tmp_path) < most(tmp_path / "model")
