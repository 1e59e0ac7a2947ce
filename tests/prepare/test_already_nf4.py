"""An NF4 checkpoint made elsewhere is taken only when all that the loader needs is there, and is NF4 indeed."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipe.errors import UserError
from recipe.prepare import prepare
from tests.prepare.fake_hub import settings_for

WEIGHT = "model.layers.1.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.fixture(params=[True, False], ids=["nested", "single"])
def nested(request):
    return request.param


@pytest.fixture
def folder(nf4_model, tmp_path, nested):
    """An NF4 checkpoint as another tool would leave it: without our record."""
    from tests.models import source_of

    if nested:
        made = nf4_model(family="llama")
    else:
        from recipe.settings import from_dict

        made = prepare(
            from_dict(
                {
                    "model": {"id": str(source_of(nf4_model(family="llama")))},
                    "paths": {"models": str(tmp_path / "single")},
                    "quantization": {"double_quant": False},
                }
            )
        ).folder
    copy = shutil.copytree(made, tmp_path / "elsewhere")
    (copy / "prepare.json").unlink()
    return copy


def change(folder, edit):
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def state(**values):
    def edit(tensors):
        content = json.loads(bytes(tensors[STATE].tolist())) | values
        tensors[STATE] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return edit


def without(suffix):
    return lambda tensors: tensors.pop(WEIGHT + suffix)


def renamed_to_fp4(tensors):
    tensors[STATE.replace("nf4", "fp4")] = tensors.pop(STATE)


def shorter(suffix):
    def edit(tensors):
        tensors[WEIGHT + suffix] = tensors[WEIGHT + suffix][:-1].clone()

    return edit


def unquantised(tensors):
    for name in [name for name in tensors if name.startswith(WEIGHT)]:
        tensors.pop(name)
    tensors[WEIGHT] = torch.zeros(128, 64, dtype=torch.bfloat16)


def a_layer_lost(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        tensors.pop(name)


def all_states_lost(tensors):
    for name in [name for name in tensors if ".quant_state." in name]:
        tensors.pop(name)


REFUSED = {
    "FP4 in the state": (state(quant_type="fp4"), "quant_type is fp4, expected nf4"),
    "FP4 in the name": (renamed_to_fp4, "the quant state is fp4, expected nf4"),
    "another block size": (state(blocksize=128), "blocksize is 128, expected 64"),
    "no absmax": (without(".absmax"), "absmax is missing, expected"),
    "no quant_map": (without(".quant_map"), "quant_map is missing, expected 64 bytes"),
    "no packed weight": (without(""), "the packed weight is missing, expected 4096 bytes"),
    "no state beside absmax": (without(STATE.removeprefix(WEIGHT)), "has absmax but no `quant_state"),
    "no state at all": (all_states_lost, "config.json says NF4, but no weight has"),
    "absmax cut": (shorter(".absmax"), r"absmax is \d+ bytes, expected \d+"),
    "packed weight cut": (shorter(""), "the packed weight is 4095 bytes, expected 4096"),
    "a state that is no JSON": (
        lambda tensors: tensors[STATE].fill_(0),
        "the quant state is not readable, expected JSON",
    ),
    "a layer lost": (a_layer_lost, r"7 weights are missing, the first is model\.layers\.1\.mlp\.down_proj"),
    "a projection left unquantised": (unquantised, r"is not quantised, expected NF4"),
}
ONLY_NESTED = {
    "no nested_absmax": (without(".nested_absmax"), "nested_absmax is missing, expected"),
    "no nested_quant_map": (without(".nested_quant_map"), "nested_quant_map is missing, expected 1024 bytes"),
    "another nested block size": (state(nested_blocksize=128), "nested_blocksize is 128, expected 256"),
}


def test_it_is_taken_as_it_is(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = prepare(settings_for(tmp_path, model=str(folder)))
    assert found.folder == folder and not found.fresh
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("what", "nested"),
    [(what, nested) for what in REFUSED for nested in (True, False)] + [(what, True) for what in ONLY_NESTED],
    indirect=["nested"],
)
def test_it_is_refused_in_one_line(folder, tmp_path, what, nested):
    edit, expected = (REFUSED | ONLY_NESTED)[what]
    change(folder, edit)
    with pytest.raises(UserError) as caught:
        prepare(settings_for(tmp_path, model=str(folder)))
    message = str(caught.value)
    assert re.search(expected, message) and str(folder) in message and "\n" not in message
    assert "take another checkpoint" in message
