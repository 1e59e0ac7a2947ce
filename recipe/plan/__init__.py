"""`recipe plan`: does this run fit on this machine, part by part, how long does it take, and what would make it fit?

Answers in a second, without a GPU, without weights and without network; imports no torch.
"""

from recipe.plan.budget import Plan, make_plan, plan_for
from recipe.plan.table import render
from recipe.plan.target import Target, target_of
from recipe.plan.ways import ways_out

__all__ = ["Plan", "Target", "make_plan", "plan_for", "render", "target_of", "ways_out"]
