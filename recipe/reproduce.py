"""`recipe reproduce`: is everything here that a run was made of, and does it give the same adapters again?

Three steps: compare the run's manifest with the present, train into NAME-again as anybody would, compare both runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipe.errors import Refused
from recipe.files import read_json
from recipe.hardware import Machine
from recipe.settings import Settings
from recipe.train.run import Run, read_jsonl

SUFFIX = "-again"
# Two runs on a GPU without train.deterministic: their held-out losses may lie this far apart, relative to the loss. 2e-4
# were measured after 20 steps (docs/evaluation.md), and longer runs drift on.
GPU_TOLERANCE = 0.01
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Difference:
    """`decides`: whether the result may be another one because of it."""

    what: str
    then: str
    now: str
    decides: bool


def again(run: Run) -> Run:
    return Run(run.folder.with_name(run.name + SUFFIX))


def present(settings: Settings, machine: Machine, world_size: int, then: dict[str, Any]) -> dict[str, Any]:
    """The manifest that the run would have if it began now; a model that is not prepared yet has no hashes."""
    from recipe.data.prepare import hashes_of
    from recipe.prepare import RECORD, Prepared, prepare, prepared_folder
    from recipe.train.manifest import manifest

    folder = prepared_folder(settings)
    if (folder / RECORD).exists():
        prepared = prepare(settings)
    elif Path(then["model"]["folder"]).exists():  # quantised elsewhere, taken as it is
        prepared = Prepared(
            Path(then["model"]["folder"]), then["model"]["name"], then["model"]["revision"], False
        )
    else:
        prepared = Prepared(folder, then["model"]["name"], None, False)
    return manifest(settings, prepared, machine, world_size, {}, hashes_of(settings.data))


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """What differs between two manifests, what decides the result first."""
    on_gpu = bool(then["gpus"] or now["gpus"])
    found: list[Difference] = []

    def compare(what: str, old: Any, new: Any, decides: bool) -> None:
        if old != new:
            found.append(Difference(what, _short(old), _short(new), decides and old is not None))

    # An older manifest has no hash of the sources: then the commit must do.
    sources = then.get("sources_sha256")
    compare("sources", sources, now["sources_sha256"], True)
    compare("git commit", then["git_commit"], now["git_commit"], sources is None)
    for name in sorted(then["lock_sha256"].keys() & now["lock_sha256"].keys()):
        compare(name, then["lock_sha256"][name], now["lock_sha256"][name], False)  # versions, below, decide
    compare("image", then["image_digest"] or "none", now["image_digest"] or "none", False)
    for name in sorted(then["versions"] | now["versions"]):
        compare(name, then["versions"].get(name), now["versions"].get(name), True)
    compare("python", then["python"], now["python"], False)
    _compare_models(then["model"], now["model"], compare)
    compare("data", then["data"]["sha256"], now["data"]["sha256"], True)
    compare("held-out data", then["data"]["eval_sha256"], now["data"]["eval_sha256"], True)
    compare("ranks", then["world_size"], now["world_size"], True)
    compare("GPUs", ", ".join(then["gpus"]) or "none", ", ".join(now["gpus"]) or "none", True)
    compare("driver", then["driver"] or "none", now["driver"] or "none", False)
    compare("processor", then["cpu"], now["cpu"], not on_gpu)
    compare("threads per rank", then.get("threads"), now["threads"], not on_gpu)
    compare("kernel", then["kernel"], now["kernel"], False)
    return sorted(found, key=lambda difference: not difference.decides)


def _compare_models(then: dict[str, Any], now: dict[str, Any], compare) -> None:
    compare("model", then["name"], now["name"], True)
    if not Path(now["folder"]).exists():
        compare("model files", "prepared", "not prepared here yet", False)
        return
    compare("model revision", then["revision"], now["revision"], True)
    for name in sorted(then["sha256"] | now["sha256"]):
        compare(
            name,
            then["sha256"].get(name, "missing"),
            now["sha256"].get(name, "missing"),
            bool(then["sha256"]),
        )


def require_same(run: Run, found: list[Difference], anyway: bool) -> None:
    """Raises Refused where something differs that decides the result, unless that is wanted."""
    deciding = [difference.what for difference in found if difference.decides]
    if deciding and not anyway:
        raise Refused(
            f"RUN={run.name}: {', '.join(deciding)} differ{'s' if len(deciding) == 1 else ''} from what the run was made "
            "of, so the result may too; restore that, or go on with --anyway"
        )


def compare(run: Run, repeated: Run) -> dict[str, Any]:
    """Both finished runs side by side. `as_expected`: the same bytes where those are promised, else within the spread."""
    import torch
    from safetensors.torch import load_file

    from recipe.export.plain import finished_checkpoint
    from recipe.train.checkpoint import ADAPTERS, read_state

    folders = [finished_checkpoint(one) for one in (run, repeated)]
    hashes = [read_state(folder)["sha256"][ADAPTERS] for folder in folders]
    manifests = [read_json(one.manifest) for one in (run, repeated)]
    losses = [{line["step"]: line["loss"] for line in read_jsonl(one.metrics)} for one in (run, repeated)]
    common = sorted(losses[0].keys() & losses[1].keys())
    apart = {step: abs(losses[0][step] - losses[1][step]) for step in common}
    first = next((step for step in common if apart[step]), None)
    tensors = [load_file(folder / ADAPTERS) for folder in folders]
    largest, where = 0.0, None
    squares = torch.zeros(2, dtype=torch.float64)
    for name in sorted(tensors[0].keys() & tensors[1].keys()):
        left, right = (one[name].double() for one in tensors)
        if left.shape != right.shape:
            largest, where = float("inf"), name
            continue
        difference = (left - right).abs()
        squares += torch.stack([difference.square().sum(), left.square().sum()])
        if difference.max() > largest:
            largest, where = difference.max().item(), name
    held_out = [read_json(one.summary)["held_out_loss"] for one in (run, repeated)]
    identical = hashes[0] == hashes[1]
    promised = not manifests[0]["gpus"] or run.settings().train.deterministic
    near = None in held_out or abs(held_out[0] - held_out[1]) <= GPU_TOLERANCE * abs(held_out[0])
    return {
        "run": run.name,
        "again": repeated.name,
        "differences": [asdict(difference) for difference in differences(*manifests)],
        "identical": identical,
        "identity_promised": promised,
        "as_expected": identical or (not promised and near),
        "adapters_sha256": hashes,
        "steps": [len(one) for one in losses],
        "loss": {"largest_difference": max(apart.values(), default=0.0), "first_differing_step": first},
        "held_out_loss": held_out,
        "weights": {
            "largest_difference": largest,
            "tensor": where,
            "relative_difference": (squares[0] / squares[1].clamp(min=1e-300)).sqrt().item(),
        },
    }


def table(found: list[Difference]) -> str:
    if not found:
        return "nothing differs from what the run was made of"
    width = max(len(difference.what) for difference in found)
    then = max(len(difference.then) for difference in found)
    lines = [f"{'differs':<{width}}  {'then':<{then}}  now"]
    for difference in found:
        mark = "  (decides the result)" if difference.decides else ""
        lines.append(f"{difference.what:<{width}}  {difference.then:<{then}}  {difference.now}{mark}")
    return "\n".join(lines)


def render(result: dict[str, Any]) -> str:
    names = f"{result['run']} and {result['again']}"
    if result["identical"]:
        return f"{names}: the same adapters, byte for byte (sha256 {result['adapters_sha256'][0]})"
    step, weights = result["loss"]["first_differing_step"], result["weights"]
    since = "no step" if step is None else f"step {step} on"
    verdict = (
        "as runs on GPUs do without train.deterministic"
        if result["as_expected"]
        else "which should be the same bytes"
        if result["identity_promised"]
        else f"by more than {GPU_TOLERANCE:.0%} of the held-out loss"
    )
    before, after = ("not measured" if loss is None else f"{loss:.6f}" for loss in result["held_out_loss"])
    return "\n".join(
        [
            f"{names} differ, {verdict}",
            f"losses   from {since}, at most {result['loss']['largest_difference']:.2e}; held out {before} and {after}",
            f"weights  at most {weights['largest_difference']:.2e} ({weights['tensor']}), "
            f"{weights['relative_difference']:.2e} of their norm",
        ]
    )


def _short(value: Any) -> str:
    if value is None:
        return NOT_RECORDED
    text = str(value)
    is_hash = len(text) >= 40 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_hash else text
