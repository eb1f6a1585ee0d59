"""Jobs: units of work whose row is the truth.

    queued → running → succeeded | failed | cancelled; back to queued on a lost lease

A job is planned in people's words and stored in digests. A worker claims it by compare-and-set with a
lease, numbered by attempt; every later word of that worker names the attempt, and one that lost its lease
is refused. What a job made is committed in the transaction that ends it, so nothing is made twice.

    submit, retry                      asking       for work, as `planning` makes a recipe of people's words
    claim, claim_beside, inputs …      claiming     what a worker gets
    held, heartbeat, finish, fail      working      what it says of it
    cancel, withdraw, hold, let_go     moves        what people, campaigns and the clock do with it
    page, events, info, waiting        looking

Under them: `access` (rows, locks, what is written down).
"""

from .access import UNKNOWN, Origin, get, plain
from .asking import retry, submit
from .claiming import PATIENCE, called, claim, claim_beside, inputs, output_series, specs
from .looking import events, info, names, page, waiting
from .moves import cancel, hold, let_go, requeue_expired, withdraw
from .planning import recorded_recipe, training_of
from .working import fail, finish, heartbeat, held

__all__ = [
    "PATIENCE",
    "UNKNOWN",
    "Origin",
    "called",
    "cancel",
    "claim",
    "claim_beside",
    "events",
    "fail",
    "finish",
    "get",
    "heartbeat",
    "held",
    "hold",
    "info",
    "inputs",
    "let_go",
    "names",
    "output_series",
    "page",
    "plain",
    "recorded_recipe",
    "requeue_expired",
    "retry",
    "specs",
    "submit",
    "training_of",
    "waiting",
    "withdraw",
]
