"""Upgrade campaigns: persist and carry out what `registry.core.campaign` decides.

    plan, create                   planning     what an upgrade would do, and the campaign that it becomes
    start … roll_back              moves        what a person does with it
    disagreements, label           labels       answers that a person labels where the suite leaves it open
    unfinished, step, finish       running      what the scheduler does with it, again and again until all is final
    info                           show         what it is, in the words of the wire

Under them: `access` (rows and locks), `actors` (in whose name), `reading` (facts), `measures` (signals).
"""

from .access import get, newest
from .labels import disagreements, label
from .moves import abort, approve, pause, resume, roll_back, start
from .planning import create, plan
from .running import finish, step, stumble, unfinished
from .show import info

__all__ = [
    "abort",
    "approve",
    "create",
    "disagreements",
    "finish",
    "get",
    "info",
    "label",
    "newest",
    "pause",
    "plan",
    "resume",
    "roll_back",
    "start",
    "step",
    "stumble",
    "unfinished",
]
