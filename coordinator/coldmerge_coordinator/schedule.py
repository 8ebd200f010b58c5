"""When a model's next round is due: cron expressions in a time zone, read as Debian does."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from coldmerge.core.errors import ConfigError


def next_tick(cron: str, timezone: str, after: datetime) -> datetime:
    """The first tick strictly after `after`, in UTC.

    A tick that falls into the hour skipped in spring happens right after it; one in the
    hour repeated in autumn happens once.

    Raises:
        ConfigError: no such time zone, not a cron expression, or one that never happens.
    """
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ConfigError(
            "schedule.unknown_timezone",
            f"There is no time zone {timezone!r}.",
            expected="a name such as Europe/Berlin or UTC",
            got=timezone,
            hint="Correct `schedule.timezone` in the round template.",
        ) from error
    try:
        for tick in CronSim(cron, after.astimezone(zone)):
            instant: datetime = tick.astimezone(UTC)
            if instant > after:
                return instant
    except CronSimError as error:
        raise ConfigError(
            "schedule.bad_cron",
            f"{cron!r} is not a cron expression: {error}.",
            expected="minute hour day month weekday, such as `0 6 * * MON`",
            got=cron,
            hint="Correct `schedule.cron` in the round template.",
        ) from error
    raise ConfigError(
        "schedule.never",
        f"The cron expression {cron!r} never comes due.",
        got=cron,
        hint="Correct `schedule.cron` in the round template.",
    )
