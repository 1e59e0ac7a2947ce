"""What `export` publishes is what was trained, as the plain libraries see it; anything else does not get the name."""

import json
import math
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recipe.cli import main
from recipe.export import chat as chat_module
from recipe.export import evaluate
from recipe.export.plain import held_out_documents, mean_loss
from recipe.export.tasks import find, scores
from recipe.files import sha256_of
from recipe.train.checkpoint import _state_hash
from recipe.train.run import Run
from tests.train.tiny_run import PLAIN_STEPS, flip_a_byte, plain_run

LAST = f"step-{PLAIN_STEPS:06d}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs folder with `good`, trained on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(plain_run(), folder / "good")
    return folder


@pytest.fixture(scope="module")
def exported(runs):
    """`good`, exported; what `--json` printed."""
    return export(runs, "good")


@pytest.fixture
def copy(runs, request):
    """A copy of the run, as it was before any export, to be spoilt."""
    folder = runs / "copy"
    shutil.copytree(runs / "good", folder, ignore=shutil.ignore_patterns("adapters"))
    yield folder
    shutil.rmtree(folder)


def export(runs, name):
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["export", "--run", name, "--set", f"paths.runs={runs}", "--json"])
    assert code == 0
    return json.loads(out.getvalue())


def summary(run):
    return json.loads((run / "summary.json").read_text())


def test_plain_peft_gives_the_trainers_loss(runs, exported):
    run = Run(runs / "good")
    model_folder = json.loads(run.manifest.read_text())["model"]["folder"]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for layer in base.modules():
        if hasattr(
            layer, "compute_dtype"
        ):  # the checkpoint names bf16, as GPUs compute; this run was in fp32
            layer.compute_dtype = torch.float32
            layer.support_avx512bf16_for_cpu = False  # else bitsandbytes computes in bf16 on such CPUs
    model = PeftModel.from_pretrained(base, str(run.adapters))
    documents = held_out_documents(run)
    assert len(documents) == 24
    loss = mean_loss(model.float(), documents, pad=0)
    assert loss == pytest.approx(summary(run.folder)["held_out_loss"], abs=1e-4)
    with model.disable_adapter():
        assert mean_loss(model, documents, pad=0) > loss + 1


def test_the_folder_is_a_peft_folder_with_its_proof(runs, exported):
    folder = runs / "good" / "adapters"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "export.json",
        "tokenizer.json",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)
    proof = json.loads((folder / "export.json").read_text())
    assert exported == {"folder": str(folder), **proof}
    assert proof["tensors"] == 2 * 7 * 2
    loss = proof["held_out_loss"]
    assert abs(loss["plain_peft"] - loss["trainer"]) <= loss["tolerance"] == 1e-4
    assert all(sha256_of(folder / name) == digest for name, digest in proof["sha256"].items())
    trained = load_file(runs / "good" / "checkpoints" / LAST / "adapters.safetensors")
    written = load_file(folder / "adapter_model.safetensors")
    assert trained.keys() == written.keys()
    assert all(torch.equal(trained[name], written[name]) and written[name].any() for name in trained)
    card = (folder / "README.md").read_text()
    assert "rank 4, alpha 8" in card and f"{summary(runs / 'good')['held_out_loss']:.4f}" in card
    assert not [path for path in (runs / "good").iterdir() if path.name.startswith(".adapters")]


def test_the_code_in_the_card_loads_it(runs, exported):
    run = Run(runs / "good")
    code = re.search(r"```python\n(.*?)```", (run.adapters / "README.md").read_text(), re.DOTALL)[1]
    manifest = json.loads(run.manifest.read_text())
    code = code.replace(f'"{manifest["model"]["name"]}"', repr(run.settings().model.id))
    scope = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(run.adapters)), scope)
    loss = mean_loss(scope["model"].float().eval(), held_out_documents(run), pad=0)
    # bitsandbytes computes in bf16 on CPUs that have it, whatever is asked for.
    assert loss == pytest.approx(summary(run.folder)["held_out_loss"], abs=1e-2)


def change_weights(run, change):
    """Alter the adapters of the last checkpoint and make its hashes fit, as a faulty gather would have written them."""
    checkpoint = run / "checkpoints" / LAST
    path = checkpoint / "adapters.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path, metadata={"format": "pt"})
    state = json.loads((checkpoint / "state.json").read_text())
    state.pop("state_sha256")
    state["sha256"]["adapters.safetensors"] = sha256_of(path)
    (checkpoint / "state.json").write_text(json.dumps(state | {"state_sha256": _state_hash(state)}))


def without_rank_1(tensors):
    """accelerate PR 4206: all but rank 0's slice is lost."""
    for tensor in tensors.values():
        tensor[len(tensor) // 2 :] = 0
    return tensors


def halves_swapped(tensors):
    return {name: torch.cat(tensor.chunk(2)[::-1]).contiguous() for name, tensor in tensors.items()}


def a_and_b_swapped(tensors):
    """Of the square layers, so that every shape fits."""
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    square = [name for name in tensors if "q_proj" in name or "o_proj" in name]
    swapped = {
        name.replace(a, b): tensors[name].T.contiguous()
        for name in square
        for a, b in other.items()
        if a in name
    }
    assert swapped.keys() == set(square)
    return tensors | swapped


def one_tensor_lost(tensors):
    return dict(list(tensors.items())[1:])


FAULTS = {
    "rank 1's half zero": (without_rank_1, "held-out loss of"),
    "halves swapped": (halves_swapped, "held-out loss of"),
    "A and B swapped": (a_and_b_swapped, "held-out loss of"),
    "a tensor lost": (one_tensor_lost, "tensors are not as written"),
}


def refused(run, capsys, code, *parts, options=()):
    """The export must end with this code and one line, and leave the run as it is."""
    before = {p: (p.read_bytes() if p.is_file() else None) for p in run.rglob("*")}
    assert main(["export", "--run", run.name, "--set", f"paths.runs={run.parent}", *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in err
    for part in parts:
        assert part in line
    assert {p: (p.read_bytes() if p.is_file() else None) for p in run.rglob("*")} == before


@pytest.mark.parametrize(("change", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_adapters_that_are_not_what_was_trained_are_not_exported(change, said, copy, capsys):
    change_weights(copy, change)
    refused(copy, capsys, 1, "RUN=copy", said, "nothing was exported")
    assert not (copy / "adapters").exists()


def test_a_wrong_alpha_is_not_exported_and_older_adapters_stay(copy, runs, exported, capsys):
    shutil.copytree(runs / "good" / "adapters", copy / "adapters")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("alpha: 8.0", "alpha: 16.0"))
    refused(copy, capsys, 1, "held-out loss of", "nothing was exported", options=["--replace"])


def test_a_damaged_checkpoint_is_not_exported(copy, capsys):
    flip_a_byte(copy / "checkpoints" / LAST / "adapters.safetensors")
    refused(copy, capsys, 2, LAST, "adapters.safetensors is missing or damaged")


def test_no_disk_space_for_the_adapters(copy, capsys, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    refused(copy, capsys, 2, "0.0 GiB free", "the adapters")


def test_eval_compares_base_and_tuned(runs, exported, capsys):
    assert main(["eval", "--run", "good", "--set", f"paths.runs={runs}", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report == json.loads((runs / "good" / "eval.json").read_text())
    base, tuned = report["base"], report["tuned"]
    assert tuned["loss"] == pytest.approx(summary(runs / "good")["held_out_loss"], abs=1e-4)
    assert base["loss"] > tuned["loss"] + 1
    assert tuned["perplexity"] == pytest.approx(math.exp(tuned["loss"]))
    assert base["prompts"] == tuned["prompts"] == 4
    assert base["exact_matches"] == 0
    assert len(report["samples"]) == 2
    assert all(sample["reference"] == "the answer is yes" for sample in report["samples"])
    assert "Warning" not in err
    text = evaluate.render(report)
    assert "24 held-out rows" in text and "exact answers" in text and "expected   the answer is yes" in text


def test_eval_writes_what_was_answered_before_and_after(runs, exported, capsys):
    """The first held-out prompts where none are set; else those of the config, put as the training rows put theirs."""
    config = runs / "good" / "config.yaml"
    kept = config.read_text()
    command = ["eval", "--run", "good", "--set", f"paths.runs={runs}", "--json"]
    try:
        for prompts in ([], ["number 7", "What is <b>?"]):
            config.write_text(kept.replace("prompts: []", f"prompts: {json.dumps(prompts)}"))
            assert main(command) == 0
            samples = json.loads(capsys.readouterr().out)["samples"]
            lines = [json.loads(line) for line in (runs / "good" / "samples.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == [0, 0, PLAIN_STEPS, PLAIN_STEPS]
            assert [line["answer"] for line in lines] == [s["base"] for s in samples] + [
                s["tuned"] for s in samples
            ]
            assert [line["prompt"] for line in lines[:2]] == [line["prompt"] for line in lines[2:]]
            if prompts:
                assert [line["prompt"] for line in lines[:2]] == prompts
                assert [line["reference"] for line in lines] == [None] * 4
            else:
                assert {line["reference"] for line in lines} == {"the answer is yes"}
        assert main([*command[:-1], "--samples", "1"]) == 0
        out = capsys.readouterr().out
        assert "asked      number 7" in out and "What is" not in out and "expected" not in out
    finally:
        config.write_text(kept)


def test_a_fixed_prompt_is_put_as_the_training_rows_were(runs, exported):
    run = Run(runs / "good")
    _, tokenizer = evaluate.load_run(run)
    config = run.config.read_text()
    run.config.write_text(config.replace("prompts: []", "prompts: [number 7]"))
    try:
        (shown,) = evaluate.shown_prompts(run, tokenizer, [], None)
    finally:
        run.config.write_text(config)
    assert tokenizer.decode(shown.ids) == "<|im_start|>user\nnumber 7<|im_end|>\n<|im_start|>assistant\n"


TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{a}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_eval_scores_tasks_without_a_network(runs, exported, capsys, tmp_path, monkeypatch):
    """A task that comes with the recipe, and one of a file with its data beside it; the second has an easy answer."""
    monkeypatch.setenv("RECIPE_NETWORK", "none")
    (tmp_path / "mine.yaml").write_text(TASK)
    prompt = "<|im_start|>user\nnumber 7<|im_end|>\n<|im_start|>assistant\nthe answer is"
    (tmp_path / "rows.jsonl").write_text((json.dumps({"q": prompt, "a": 0}) + "\n") * 3)
    tasks = f"basics,{tmp_path / 'mine.yaml'}"
    command = ["eval", "--run", "good", "--set", f"paths.runs={runs}", "--tasks", tasks, "--task-rows", "6"]
    assert main([*command, "--samples", "0"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads((runs / "good" / "eval.json").read_text())
    for name in ("base", "tuned"):
        assert {task: one["rows"] for task, one in report[name]["tasks"].items()} == {"basics": 6, "mine": 3}
        assert 0 <= report[name]["tasks"]["basics"]["acc"] <= 1
    assert report["tuned"]["tasks"]["mine"]["acc"] == 1.0
    assert re.search(r"^mine, acc +[\d.]+ +1\.0000$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("tasks", "network", "parts"),
    [
        ("held_out", "", ["held_out", "1 different answers", "2 to 50", "eval.exact_match"]),
        ("no.yaml", "", ["no.yaml", "no such file", "YAML"]),
        ("hellaswag", "none", ["hellaswag", "model hub", "no network, by design", "RUNTIME=host", "basics"]),
    ],
)
def test_a_task_that_cannot_be_had_is_one_line(tasks, network, parts, runs, exported, capsys, monkeypatch):
    monkeypatch.setenv("RECIPE_NETWORK", network)
    before = (runs / "good" / "eval.json").read_bytes()
    assert main(["eval", "--run", "good", "--set", f"paths.runs={runs}", "--tasks", tasks]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and all(part in err for part in parts)
    assert (runs / "good" / "eval.json").read_bytes() == before


def test_held_out_rows_are_a_choice_between_their_answers(runs, exported):
    """The likelier of all answers that occur: the model is asked with the very tokens that it was trained on."""
    model, tokenizer = evaluate.load_run(Run(runs / "good"))
    asked = "<|im_start|>user\nnumber {}<|im_end|>\n<|im_start|>assistant\n"
    pairs = [(asked.format(n), "hello world" if n == 2 else "the answer is yes") for n in range(3)]
    found = scores(model, tokenizer, find(["held_out"], pairs), batch_size=2)
    assert found == {"held_out": {"acc": pytest.approx(2 / 3), "rows": 3}}


def test_eval_before_export_says_what_to_do(copy, capsys):
    assert main(["eval", "--run", "copy", "--set", f"paths.runs={copy.parent}"]) == 2
    assert "make export-adapters RUN=copy" in capsys.readouterr().err


def test_chat_answers_once(runs, exported, capsys, monkeypatch):
    monkeypatch.setattr(chat_module, "MAX_NEW_TOKENS", 8)
    command = ["chat", "--run", "good", "--set", f"paths.runs={runs}", "--once", "number 7"]
    assert main(command) == 0
    tuned, err = capsys.readouterr()
    assert tuned.strip() and "number 7" not in tuned
    assert "Warning" not in err
    assert main([*command, "--base"]) == 0
    assert capsys.readouterr().out != tuned


def test_chat_puts_a_question_as_the_training_rows_did(runs, exported, capsys, monkeypatch):
    """In the chat template with their system message; as plain text where they were no conversations."""
    manifest = runs / "good" / "manifest.json"
    kept = manifest.read_text()
    monkeypatch.setattr(chat_module, "MAX_NEW_TOKENS", 1)
    asked = []
    monkeypatch.setattr(
        chat_module, "render", lambda history, *args, **kwargs: asked.append(history) or "number"
    )
    command = ["chat", "--run", "good", "--set", f"paths.runs={runs}", "--once", "number 7"]
    question = {"role": "user", "content": "number 7"}

    def trained_with(**form):
        values = json.loads(kept)
        manifest.write_text(json.dumps(values | {"data": values["data"] | form}))

    try:
        trained_with(messages=True, system="Be brief.")
        assert main(command) == 0
        assert main([*command, "--system", "Be rude."]) == 0
        assert [history[0]["content"] for history in asked] == ["Be brief.", "Be rude."]
        assert [history[1:] for history in asked] == [[question]] * 2
        trained_with(messages=False, system=None)
        assert main(command) == 0
        assert len(asked) == 2, "the template was used for plain text"
        capsys.readouterr()
        assert main([*command, "--system", "Be rude."]) == 2
        assert "--system: RUN=good was trained on plain text" in capsys.readouterr().err
    finally:
        manifest.write_text(kept)
