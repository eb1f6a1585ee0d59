"""States of pushes, jobs, versions and campaigns, and the moves between them.

A move that is not in the table is a `MoveNotAllowed`; the database repeats the states as a check
constraint, and every move is a compare-and-set on the state it starts from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from .errors import MoveNotAllowed


class PushState(StrEnum):
    """open → uploading → verifying → verified → committed; rejected, expired and aborted are the other ends.

    A push of its own passes through verified within one transaction; it waits there for its job's end, or
    for its author's word after an alias moved in between.
    """

    OPEN = "open"
    UPLOADING = "uploading"
    VERIFYING = "verifying"
    VERIFIED = "verified"
    COMMITTED = "committed"
    REJECTED = "rejected"
    EXPIRED = "expired"
    ABORTED = "aborted"


UNFINISHED = (PushState.OPEN, PushState.UPLOADING, PushState.VERIFYING, PushState.VERIFIED)
"""A push in one of these may still be committed."""


class JobState(StrEnum):
    """queued → running → succeeded | failed | cancelled; back to queued on a lost lease."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class CampaignState(StrEnum):
    """planned → running → finished | aborted."""

    PLANNED = "planned"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"


class VersionState(StrEnum):
    """live ⇄ yanked, quarantined; → deleted, for good (`registry.services.withdrawals`)."""

    LIVE = "live"
    YANKED = "yanked"
    QUARANTINED = "quarantined"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Machine:
    """A noun, and for each move the states it may start from and the state it leads to."""

    noun: str
    moves: Mapping[str, tuple[frozenset[str], str]]

    def after(self, move: str, state: str, identity: object) -> str:
        """The state that ``move`` leads to from ``state``; `MoveNotAllowed` when it may not start there."""
        allowed, target = self.moves[move]
        if state not in allowed:
            raise MoveNotAllowed(
                noun=self.noun, id=str(identity), state=str(state), move=move, allowed=", ".join(sorted(allowed))
            )
        return target


def _from(*states: str) -> frozenset[str]:
    return frozenset(str(state) for state in states)


_UNFINISHED = _from(*UNFINISHED)
PUSH = Machine(
    "push",
    {
        "upload": (_from(PushState.OPEN, PushState.UPLOADING), PushState.UPLOADING),
        "verify": (_from(PushState.OPEN, PushState.UPLOADING, PushState.VERIFYING), PushState.VERIFYING),
        "pass": (_from(PushState.VERIFYING), PushState.VERIFIED),
        "reject": (_from(PushState.VERIFYING), PushState.REJECTED),
        "commit": (_from(PushState.VERIFIED), PushState.COMMITTED),
        "expire": (_UNFINISHED, PushState.EXPIRED),
        "abort": (_UNFINISHED, PushState.ABORTED),
    },
)
JOB = Machine(
    "job",
    {
        "claim": (_from(JobState.QUEUED), JobState.RUNNING),
        "succeed": (_from(JobState.RUNNING), JobState.SUCCEEDED),
        "fail": (_from(JobState.RUNNING), JobState.FAILED),
        "requeue": (_from(JobState.RUNNING), JobState.QUEUED),
        "cancel": (_from(JobState.QUEUED, JobState.RUNNING), JobState.CANCELLED),
        "retry": (_from(JobState.FAILED, JobState.CANCELLED), JobState.QUEUED),
    },
)
VERSION = Machine(
    "version",
    {
        "yank": (_from(VersionState.LIVE), VersionState.YANKED),
        "quarantine": (_from(VersionState.LIVE, VersionState.YANKED), VersionState.QUARANTINED),
        "reinstate": (_from(VersionState.YANKED, VersionState.QUARANTINED), VersionState.LIVE),
        "delete": (_from(VersionState.LIVE, VersionState.YANKED, VersionState.QUARANTINED), VersionState.DELETED),
    },
)
CAMPAIGN = Machine(
    "campaign",
    {
        "start": (_from(CampaignState.PLANNED), CampaignState.RUNNING),
        "finish": (_from(CampaignState.RUNNING), CampaignState.FINISHED),
        "abort": (_from(CampaignState.PLANNED, CampaignState.RUNNING), CampaignState.ABORTED),
    },
)
