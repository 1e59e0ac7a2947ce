"""One training of `recipe bench --suite plan`: planned for the cards that are asked for, then run here.

python -m recipe.bench.trained WANTED.json PLANNED.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from recipe.files import write_json
from recipe.hardware import probe
from recipe.plan import plan_for, target_of
from recipe.plan.cards import card_in
from recipe.prepare import Prepared
from recipe.settings import load
from recipe.train import launch


def main(wanted_file: str, planned_file: str) -> int:
    wanted = json.loads(Path(wanted_file).read_text())
    settings, machine = load(wanted["config"]), probe(".")
    on_gpu = wanted["vram_gib"] is not None
    target = target_of(
        gpus=wanted["ranks"] if on_gpu else 0, vram_gib=wanted["vram_gib"], ram_gib=wanted["ram_gib"]
    )
    if on_gpu:  # as large as asked for, as fast as the ones that are here
        cards = tuple(card_in(gpu.name) for gpu in machine.gpus[: wanted["ranks"]])
        target = dataclasses.replace(target, cards=cards)
    model = Path(settings.model.id or "")
    plan = plan_for(settings, target, model)
    write_json(Path(planned_file), plan.to_dict())
    launch.start(settings, "run", Prepared(model, model.name, None, fresh=False), machine, plan)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
