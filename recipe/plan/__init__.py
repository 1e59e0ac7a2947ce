"""`recipe plan`: does this run fit on this machine, part by part, and about how long does it take?

Answers in a second, without a GPU, without weights and without network; imports no torch.
"""

from recipe.plan.budget import Plan, make_plan
from recipe.plan.table import render

__all__ = ["Plan", "make_plan", "render"]
