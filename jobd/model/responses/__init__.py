"""Responses: the types of `data` in both APIs, and the response that the actor returns.

The field names are the contract of the APIs. Docstrings and descriptions appear in the OpenAPI document.
"""

# ruff: noqa: F403

from jobd.model.responses.actor_response import *
from jobd.model.responses.cleanup_views import *
from jobd.model.responses.daemon_views import *
from jobd.model.responses.grant_views import *
from jobd.model.responses.job_views import *
from jobd.model.responses.plan_views import *
from jobd.model.responses.queue_views import *
from jobd.model.responses.schedule_views import *
from jobd.model.responses.shared import *
from jobd.model.responses.store_views import *
from jobd.model.responses.transfer_views import *
from jobd.model.responses.webhook_views import *
from jobd.model.responses.worker_views import *
