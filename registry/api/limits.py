"""How much one token, or one address, may ask: token buckets, shared by all API processes where there is a Redis.

    level(t) = min(burst, level(t₀) + (t − t₀) · per_s)        a request takes 1, and waits (1 − level) / per_s

Shared buckets live in the broker's Redis. A process takes a tenth of a second's worth at once and spends it within a
second, so that not every request goes there; what it does not spend is lost, which only makes the limit stricter.
Where there is no Redis (embedded mode), or it is away, every process keeps buckets of its own: the limit then holds
per process, and nobody is locked out because a part is down.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import redis.asyncio
import structlog
from redis.exceptions import RedisError

KEPT = 10_000
"""Buckets that a process keeps at most; the ones that were not used for longest are full again by then."""
AWAY_S = 5.0
"""For how long a Redis that did not answer is not asked again."""
SPENT_WITHIN_S = 1.0
log = structlog.get_logger()

_TAKE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local per_s, burst, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local kept = redis.call('HMGET', KEYS[1], 'level', 'at')
local level = math.min(burst, (tonumber(kept[1]) or burst) + (now - (tonumber(kept[2]) or now)) * per_s)
local given = math.min(wanted, math.floor(level))
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level - given), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], math.ceil(burst / per_s) + 1)
return {given, string.format('%.6f', math.max(0, (1 - level) / per_s))}
"""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a second for good, and so many at once after a rest."""

    per_s: float
    burst: int


class Buckets:
    """Buckets of this process."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, key: str, rate: Rate) -> float:
        """Seconds until 1 can be taken; 0.0 when it can be now."""
        return max(0.0, (1 - self._level(key, rate)) / rate.per_s)

    def take(self, key: str, rate: Rate) -> float:
        """Take 1 and return 0.0; or take nothing and return the seconds to wait."""
        level = self._level(key, rate)
        if level < 1:
            return (1 - level) / rate.per_s
        self._levels[key] = (level - 1, self._clock())
        self._levels.move_to_end(key)
        while len(self._levels) > KEPT:
            self._levels.popitem(last=False)
        return 0.0

    def _level(self, key: str, rate: Rate) -> float:
        level, at = self._levels.get(key, (float(rate.burst), self._clock()))
        return min(float(rate.burst), level + (self._clock() - at) * rate.per_s)


class Limits:
    """Buckets shared through ``url`` (``redis://…``); of this process alone without one."""

    def __init__(self, url: str | None = None) -> None:
        patience = 0.5
        self._redis = (
            redis.asyncio.Redis.from_url(url, socket_timeout=patience, socket_connect_timeout=patience) if url else None
        )
        self._take = self._redis.register_script(_TAKE) if self._redis is not None else None
        self._own = Buckets()
        self._in_hand: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._seen: OrderedDict[str, float] = OrderedDict()
        """Until when a bucket that had something is not looked at again."""
        self._away_until = 0.0

    async def take(self, key: str, rate: Rate) -> float:
        """Take 1 and return 0.0; or take nothing and return the seconds to wait."""
        self._seen.pop(key, None)
        left, until = self._in_hand.pop(key, (0, 0.0))
        if not left or monotonic() >= until:
            answer = await self._ask(key, rate, max(1, min(rate.burst, round(rate.per_s / 10))))
            if answer is None:
                return self._own.take(key, rate)
            left, wait = answer
            if not left:
                return wait
            until = monotonic() + SPENT_WITHIN_S
        if left > 1:
            self._in_hand[key] = (left - 1, until)
            while len(self._in_hand) > KEPT:
                self._in_hand.popitem(last=False)
        return 0.0

    async def wait(self, key: str, rate: Rate) -> float:
        """Seconds until 1 can be taken; 0.0 when it can be, or could less than a second ago."""
        if self._seen.get(key, 0.0) > monotonic():
            return 0.0
        answer = await self._ask(key, rate, 0)
        if answer is None:
            return self._own.wait(key, rate)
        if not answer[1]:
            self._seen[key] = monotonic() + SPENT_WITHIN_S
            while len(self._seen) > KEPT:
                self._seen.popitem(last=False)
        return answer[1]

    async def _ask(self, key: str, rate: Rate, wanted: int) -> tuple[int, float] | None:
        """How many of ``wanted`` the shared bucket gives, and the wait for the next one; None while it is away."""
        if self._take is None or monotonic() < self._away_until:
            return None
        try:
            given, wait = await self._take(keys=[f"loractl:limit:{key}"], args=[rate.per_s, rate.burst, wanted])
        except (RedisError, OSError) as error:
            log.warning("limits-not-shared", reason=type(error).__name__)
            self._away_until = monotonic() + AWAY_S
            return None
        return given, float(wait)

    async def close(self) -> None:
        """Give the connection back."""
        if self._redis is not None:
            await self._redis.aclose()
