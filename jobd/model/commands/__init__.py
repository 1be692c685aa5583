"""Commands: the typed requests of both APIs and the internal requests to the actor.

A command class declares everything about its command: the bounds and descriptions of its fields, its admission class,
the name of its audit entries, its error codes, and the statuses that allow it. The first paragraph of its docstring is
the summary of the call in the OpenAPI document. Method, path and response of a call are in model/calls.py.
"""

# ruff: noqa: F403

from jobd.model.commands.command import *
from jobd.model.commands.grants import *
from jobd.model.commands.internal import *
from jobd.model.commands.issued_command import *
from jobd.model.commands.job_control import *
from jobd.model.commands.job_creation import *
from jobd.model.commands.plans import *
from jobd.model.commands.queues import *
from jobd.model.commands.reads import *
from jobd.model.commands.schedule_control import *
from jobd.model.commands.worker_control import *
