"""Make and apply plans as an operator does."""

from __future__ import annotations

from typing import Any, Final

from jobd.maintenance.plan_runner import Planner
from jobd.model.commands import MakePlan, Operator
from jobd.model.errors import checked
from jobd.model.responses import PlanResult, PlanView

EVE: Final = Operator("eve", "10.0.0.7")


async def make_plan(planner: Planner, plan_id: str = "p", **asked: Any) -> PlanView:
    return checked(await planner.make(MakePlan(**asked), plan_id))


def kept_plan(planner: Planner, plan_id: str = "p") -> PlanView:
    return checked(planner.find(plan_id))


async def apply_plan(planner: Planner, plan_id: str = "p", **pace: Any) -> PlanResult:
    return checked(await planner.apply(plan_id, EVE, **pace))
