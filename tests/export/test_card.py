"""The model card says what the run has written down, in a form that hubs read, and what the base's licence asks for."""

import json
import math
import os
import re
import shutil
import subprocess

import pytest
from huggingface_hub import ModelCard

from recipe.cli import main
from recipe.export.card import card, kind_of, refresh
from recipe.export.contents import check, contents
from recipe.export.licence import copy_licence, licence_of
from recipe.export.outcome import sparkline
from recipe.export.publish import describe, publish
from recipe.train.run import Run
from tests.export.finished import LLAMA_LICENCE, finished_run, tree
from tests.models import tiny_checkpoint
from tests.train.tiny_run import PLAIN_STEPS, jsonl

KINDS = {
    "adapters": ("peft", "adapter"),
    "merged-nf4": ("transformers", "finetune"),
    "merged-bf16": ("transformers", "finetune"),
    "gguf-q4_k_m": ("gguf", "quantized"),
    "gguf-lora": ("gguf", "adapter"),
    "gguf-base-q8_0": ("gguf", "quantized"),
}


@pytest.fixture(scope="module")
def good():
    return Run(finished_run())


@pytest.fixture
def run(good, tmp_path):
    """A copy with a model folder of its own, to be given papers; `name` and more of the manifest's model by calling it."""

    def of(name, **papers):
        folder = shutil.copytree(good.folder, tmp_path / "runs" / "poet")
        manifest = json.loads((folder / "manifest.json").read_text())
        model = tmp_path / "model"
        model.mkdir()
        for file, text in papers.items():
            (model / file.replace("_md", ".md")).write_text(text)
        manifest["model"] |= {"name": name, "folder": str(model), "revision": "c0ffee"}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return Run(folder)

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_the_hubs_library_reads_every_kind(kind, good):
    library, relation = KINDS[kind]
    data = ModelCard(card(good, kind)).data
    assert (data.library_name, data.base_model_relation, data.base_model) == (library, relation, "tiny")
    assert data.pipeline_tag == "text-generation" and "None" not in card(good, kind)
    assert ("lora" in data.tags) == (not kind.startswith("gguf-base-"))


def test_the_numbers_are_those_of_the_run(good):
    text = card(good, "adapters")
    steps, events = jsonl(good.metrics), jsonl(good.events)
    summary, manifest = (json.loads(path.read_text()) for path in (good.summary, good.manifest))
    stats = json.loads((good.folder / "data" / "stats.json").read_text())
    before = next(event["loss"] for event in events if event["kind"] == "evaluation")
    after = summary["held_out_loss"]
    assert f"| held-out loss | {before:.4f} | {after:.4f} |" in text
    assert f"| perplexity | {math.exp(before):.4f} | {math.exp(after):.4f} |" in text
    assert f"| 0 |  | {before:.4f} |" in text and f"| 1 | {steps[0]['loss']:.4f} |  |" in text
    assert f"| {PLAIN_STEPS} | {steps[-1]['loss']:.4f} | {after:.4f} |" in text
    assert f"`data.jsonl` (sha256 `{manifest['data']['sha256'][:16]}`), loss on completion" in text
    assert (
        f"{stats['rows']:,} rows of {stats['tokens']:,} tokens, {stats['in_loss']:,} of them in the loss"
        in text
    )
    assert f"Trained on {stats['rows']:,} rows" in text
    assert f"torch {manifest['versions']['torch']}" in text and "2 processes on a CPU" in text
    assert "energy | not measured" in text


def test_no_path_of_this_machine_is_in_an_export(good):
    """The folder of the run, of its model and of its data: all below the same."""
    manifest = json.loads(good.manifest.read_text())
    places = {str(finished_run().parent), os.path.dirname(manifest["data"]["path"])}
    for name, content in tree(good.adapters).items():
        assert not [place for place in places if place.encode() in content], name
    assert "/" not in re.search(r"\| data \| `(.*?)`", card(good, "adapters"))[1]


def test_energy_gpus_and_tasks_where_they_are_known(run):
    poet = run("org/base")
    lines = [line | {"power_watts": [300.0, 300.0], "step_seconds": 60.0} for line in jsonl(poet.metrics)]
    poet.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = json.loads(poet.manifest.read_text()) | {"gpus": ["RTX 3090", "RTX 3090"], "driver": "580.1"}
    poet.manifest.write_text(json.dumps(manifest))
    config = poet.config.read_text()
    poet.config.write_text(re.sub(r"(?m)^  path: .*data.jsonl$", "  path: org/rows", config))
    tasks = {"a|b": {"acc": 0.25, "rows": 4}}
    one = {"loss": 2.0, "perplexity": 7.389, "exact_matches": 1, "prompts": 4, "tasks": tasks}
    sample = {"prompt": "a secret of ours", "reference": None, "base": "no", "tuned": "yes"}
    report = {"held_out_rows": 24, "base": one, "tuned": one | {"exact_matches": 3}, "samples": [sample]}
    (poet.folder / "eval.json").write_text(json.dumps(report))
    text = card(poet, "adapters")
    assert "2 × RTX 3090, driver 580.1" in text and "| 0.12 kWh of the GPUs alone |" in text
    assert f"| time | {PLAIN_STEPS} min of steps" in text
    assert r"| a\|b, acc | 0.2500 | 0.2500 |" in text and "| exact answers | 1 of 4 | 3 of 4 |" in text
    assert "a secret" not in text, "a card is published, and held-out rows are somebody's data"
    assert ModelCard(text).data.datasets == ["org/rows"]
    assert 'from_pretrained("org/base", revision="c0ffee", quantization_config=nf4)' in text
    assert len(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].splitlines()) == 4


def test_what_the_export_found_is_told(good):
    facts = {
        "file": "poet.gguf",
        "verified_by": "llama.cpp, fresh process",
        "held_out_loss": {"llama_cpp": 2.5, "trainer": 2.25, "tolerance": 0.5, "none": None},
        "notes": ["Kept as Q8_0: all of it."],
    }
    text = card(good, "gguf-q4_k_m", facts)
    assert "Loaded again before it got its name: llama.cpp, fresh process." in text
    assert "Held-out loss: llama cpp 2.5, trainer 2.25, tolerance 0.5." in text
    assert "Kept as Q8_0: all of it." in text and "llama-cli -m poet.gguf" in text


def test_an_evaluation_that_came_later_gets_into_the_card(run, good, tmp_path):
    poet = Run(shutil.copytree(good.folder, tmp_path / "runs" / "poet"))
    assert main(["eval", "--run", "poet", "--set", f"paths.runs={poet.folder.parent}", "--json"]) == 0
    report = json.loads((poet.folder / "eval.json").read_text())
    before = tree(poet.adapters)
    assert refresh(poet, poet.adapters, kind_of(poet.adapters))
    text = (poet.adapters / "README.md").read_text()
    assert f"| loss | {report['base']['loss']:.4f} | {report['tuned']['loss']:.4f} |" in text
    assert "the answer is yes" not in text
    check(contents(poet.adapters), "test")
    assert {n for n, c in tree(poet.adapters).items() if c != before[n]} == {"README.md", "export.json"}
    assert not refresh(poet, poet.adapters, "adapters"), "nothing is new"
    (poet.adapters / "README.md").write_text("my own words")
    assert not refresh(poet, poet.adapters, "adapters"), "somebody's own words were overwritten"


def test_the_code_of_a_merged_model_runs(good, tmp_path, capsys):
    tiny_checkpoint(tmp_path / "merged")
    code = re.search(r"```python\n(.*?)```", card(good, "merged-bf16"), re.DOTALL)[1]
    assert len(code.splitlines()) == 4
    exec(code.replace("PATH_OF_THIS_FOLDER", str(tmp_path / "merged")).replace("=100", "=4"), {})
    assert capsys.readouterr().out.strip()


def test_the_modelfile_of_the_card(good, tmp_path):
    text = card(good, "gguf-lora", {"file": "a.gguf", "base_file": "b.gguf"})
    line = next(line for line in text.splitlines() if line.startswith("printf"))
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    assert (tmp_path / "Modelfile").read_text() == "FROM ./b.gguf\nADAPTER ./a.gguf\n"


def test_a_curve_falls():
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁" and sparkline([1.0]) == "▁"
    line = sparkline([1000 - n for n in range(1000)])
    assert len(line) == 60 and list(line) == sorted(line, reverse=True)


# -- licences -----------------------------------------------------------------------------------------------------------

LLAMA_3 = "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n\nMeta Llama 3 Version Release Date: April 18, 2024\n"
QWEN = "Qwen LICENSE AGREEMENT\n\nQwen LICENSE AGREEMENT Release Date: September 19, 2024\n"
QWEN_RESEARCH = (
    "Qwen RESEARCH LICENSE AGREEMENT\n\nQwen RESEARCH LICENSE AGREEMENT Release Date: September 19, 2024\n"
)
TONGYI = "Tongyi Qianwen LICENSE AGREEMENT\n\nTongyi Qianwen Release Date: August 3, 2023\n"
APACHE = (
    "                                 Apache License\n                           Version 2.0, January 2004\n"
)
MIT = "MIT License\n\nCopyright (c) 2024 somebody\n"


@pytest.mark.parametrize(
    ("papers", "model", "expected"),
    [
        ({"LICENSE": LLAMA_LICENCE}, "x", ("llama3.1", None, "Built with Llama", "Llama")),
        ({"LICENSE.txt": LLAMA_LICENCE.replace("3.1", "3.3")}, "x", ("llama3.3", None, "Built with Llama", "Llama")),
        ({"LICENSE": LLAMA_3}, "x", ("llama3", None, "Built with Meta Llama 3", "Llama 3")),
        ({"LICENSE": LLAMA_3.replace("META LLAMA 3", "LLAMA 2")}, "x", ("llama2", None, None, None)),
        ({"USE_POLICY.md": "# Llama 3.1 Acceptable Use Policy\n"}, "x", ("llama3.1", None, "Built with Llama", "Llama")),
        ({"LICENSE": QWEN}, "x", ("other", "qwen", "Built with Qwen", None)),
        ({"LICENSE": QWEN_RESEARCH}, "x", ("other", "qwen-research", "Built with Qwen", None)),
        ({"LICENSE": TONGYI}, "x", ("other", "tongyi-qianwen", None, None)),
        ({"LICENSE": APACHE}, "x", ("apache-2.0", None, None, None)),
        ({"LICENSE": MIT}, "x", ("mit", None, None, None)),
        ({"LICENSE": APACHE, "LICENSE.llama": LLAMA_LICENCE}, "x", ("llama3.1", None, "Built with Llama", "Llama")),
        ({"LICENSE": "our own"}, "x", ("other", "see-licence", None, None)),
        ({"README.md": "---\nlicense: llama3.2\n---\n# hi"}, "x", ("llama3.2", None, "Built with Llama", "Llama")),
        ({"README.md": "---\nlicense: other\nlicense_name: qwen\nlicense_link: a\n---\n"}, "x", ("other", "qwen", "Built with Qwen", None)),
        ({"README.md": "---\nlicense: other\nlicense_name: llama4\n---\n"}, "x", ("other", "llama4", "Built with Llama", "Llama")),
        ({"README.md": "---\nlicense: other\nlicense_name: mrl\nlicense_link: b\n---\n"}, "x", ("other", "mrl", None, None)),
        ({"README.md": "---\nlicense: cc-by-nc-4.0\n---\n"}, "meta-llama/Llama-3.1-8B", ("cc-by-nc-4.0", None, None, None)),
        ({"README.md": "---\n: [\n---\n"}, "meta-llama/Llama-3.1-8B", ("llama3.1", None, "Built with Llama", "Llama")),
        ({}, "unsloth/Meta-Llama-3.1-70B-bnb-4bit", ("llama3.1", None, "Built with Llama", "Llama")),
        ({}, "meta-llama/Meta-Llama-3-8B", ("llama3", None, "Built with Meta Llama 3", "Llama 3")),
        ({}, "meta-llama/Llama-3.3-70B-Instruct", ("llama3.3", None, "Built with Llama", "Llama")),
        ({}, "TinyLlama/TinyLlama-1.1B-Chat", ("apache-2.0", None, None, None)),
        ({}, "Qwen/Qwen2.5-72B-Instruct", ("other", "qwen", "Built with Qwen", None)),
        ({}, "Qwen/Qwen2.5-7B-Instruct", ("apache-2.0", None, None, None)),
        ({}, "HuggingFaceTB/SmolLM2-135M-Instruct", ("apache-2.0", None, None, None)),
        ({}, "mistralai/Mistral-7B-v0.3", ("apache-2.0", None, None, None)),
        ({}, "tiny", (None, None, None, None)),
    ],
)  # fmt: skip
def test_a_licence_is_told_by_its_papers_and_else_by_the_name(papers, model, expected, tmp_path):
    for name, text in papers.items():
        (tmp_path / name).write_text(text)
    found = licence_of(tmp_path, model)
    assert (found.id, found.hub_name, found.attribution, found.name_prefix) == expected
    assert [path.name for path in found.files] == sorted(papers.keys() - {"README.md"})


@pytest.mark.parametrize(
    ("text", "name", "allowed", "nearest"),
    [
        (LLAMA_LICENCE, "Llama-3.1-poet", True, "Llama-3.1-poet"),
        (LLAMA_LICENCE, "poet-Llama", False, "Llama-poet-Llama"),
        (LLAMA_LICENCE, "llama-poet", False, "Llama-llama-poet"),
        (LLAMA_3, "Llama3-poet", True, "Llama3-poet"),
        (LLAMA_3, "Llama_3_poet", True, "Llama_3_poet"),
        (LLAMA_3, "Llama-poet", False, "Llama-3-Llama-poet"),
        (APACHE, "poet", True, "poet"),
    ],
)
def test_names_that_a_licence_allows(text, name, allowed, nearest, tmp_path):
    (tmp_path / "LICENSE").write_text(text)
    licence = licence_of(tmp_path, "x")
    assert licence.allows(name) == allowed and licence.named(name) == nearest
    assert licence.allows(licence.named(name))


def test_a_llama_says_so_and_its_papers_travel(run, tmp_path):
    poet = run(
        "meta-llama/Llama-3.1-8B", LICENSE=LLAMA_LICENCE, USE_POLICY_md="# Llama 3.1 Acceptable Use Policy\n"
    )
    text = card(poet, "adapters")
    assert "# Llama-poet\n\n**Built with Llama**\n" in text
    assert ModelCard(text).data.license == "llama3.1" and "Acceptable Use Policy applies" in text
    target = tmp_path / "export"
    target.mkdir()
    copy_licence(tmp_path / "model", "meta-llama/Llama-3.1-8B", target)
    found = tree(target)
    assert found["LICENSE"].decode() == LLAMA_LICENCE and "USE_POLICY.md" in found
    assert found["NOTICE"].decode() == (
        "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
    )
    assert licence_of(target, "").id == "llama3.1", "of the export as of its base"


def test_a_notice_of_the_bases_own_is_kept(tmp_path):
    base, target = tmp_path / "base", tmp_path / "export"
    base.mkdir()
    target.mkdir()
    (base / "LICENSE").write_text(LLAMA_LICENCE)
    (base / "Notice.txt").write_text("theirs")
    copy_licence(base, "x", target)
    assert tree(target) == {"LICENSE": LLAMA_LICENCE.encode(), "Notice.txt": b"theirs"}
