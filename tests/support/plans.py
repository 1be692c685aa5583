"""Make and apply plans as an operator does."""

from __future__ import annotations

from typing import Any, Final

from jobd.maintenance.plan_runner import Planner
from jobd.model.commands import MakePlan, Operator
from jobd.model.responses import PlanResult, PlanView

EVE: Final = Operator("eve", "10.0.0.7")


async def make_plan(planner: Planner, plan_id: str = "p", **asked: Any) -> PlanView:
    view = await planner.make(MakePlan(**asked), plan_id)
    assert isinstance(view, PlanView), view
    return view


def kept_plan(planner: Planner, plan_id: str = "p") -> PlanView:
    view = planner.find(plan_id)
    assert isinstance(view, PlanView), view
    return view


async def apply_plan(planner: Planner, plan_id: str = "p", **pace: Any) -> PlanResult:
    result = await planner.apply(plan_id, EVE, **pace)
    assert isinstance(result, PlanResult), result
    return result
