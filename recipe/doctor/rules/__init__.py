"""All rules, by subject. The order says nothing: recipe/doctor/diagnose.py ranks what was found."""

from recipe.doctor.rule import Rule
from recipe.doctor.rules import data, ending, files, hardware, hub, memory, numbers, ranks, sharding, software

SUBJECTS: dict[str, tuple[Rule, ...]] = {
    "Memory": memory.RULES,
    "Sharding, adapters and quantisation": sharding.RULES,
    "Ranks and what joins them": ranks.RULES,
    "Software": software.RULES,
    "Data": data.RULES,
    "Numbers": numbers.RULES,
    "Files and disks": files.RULES,
    "Model hub": hub.RULES,
    "Hardware": hardware.RULES,
    "How it ended": ending.RULES,
}
RULES: tuple[Rule, ...] = tuple(rule for rules in SUBJECTS.values() for rule in rules)
