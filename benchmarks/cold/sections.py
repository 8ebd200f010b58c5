"""Tables of the report: what was gained, by whom, at what price."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from benchmarks.cold.claims import Claim
from benchmarks.cold.comparison import GROUPS, PRETRAINED, PROTOCOLS, Comparison, Place, signed
from benchmarks.cold.outcome import ALONE, BASE, MEAN, MULTITASK
from benchmarks.cold.records import COEFFICIENTS, COHORT, EXAMPLES, LORA, Records
from benchmarks.cold.rows import Row
from coldmerge.report.page import Table

NOTHING = "–"


SHIPPED = {MULTITASK: "all the data", ALONE: "nothing"}
"""What leaves home where no task vector does."""


def claims_table(found: Sequence[Claim]) -> Table:
    """Every claim with its figure."""
    rows = [[c.id, c.says, c.demand, c.verdict, c.figure, c.note or NOTHING] for c in found]
    return Table(
        "Claims",
        "R: demanded of this software. P: what the ColD Fusion paper says (Don-Yehiya et al., "
        "ACL 2023), with its own figure, which belongs to another model and other sets. O: ours. "
        "Figures are in points with the 95 % interval over examples within these sets. Unclear: "
        "the mean is on the claimed side, the interval reaches over zero.",
        ["", "claim", "asks for", "here", "figure", "how"],
        rows,
        prose=frozenset({1, 2, 4, 5}),
    )


def main_table(
    rows: Sequence[Row], protocol: str, group: str, without: Sequence[str] = ()
) -> Table:
    """Every variant, but for some, on a group of sets by a protocol: over base and mean."""
    chosen = [
        row
        for row in rows
        if (row["protocol"], row["group"]) == (protocol, group) and row["variant"] not in without
    ]
    count = max((row["sets"] for row in chosen), default=0)
    return Table(
        f"{group.capitalize()} sets, {PROTOCOLS[protocol]}",
        f"Means over {count} {group} sets; points. Gains are over the pretrained base, in pairs: "
        "the same test examples, the same training examples. Intervals are 95 %: over examples "
        "within these sets; the same with seeds and draws drawn again (with runs); across sets "
        "(Student's t). Over mean is against the plain mean after as many steps.",
        [
            *("variant", "seeds", "accuracy", "gain", "within sets", "with runs"),
            *("across sets", "median", "won", "SE", "over mean"),
        ],
        [_main_row(row) for row in chosen],
        frozenset(range(1, 11)),
    )


def _main_row(row: Row) -> list[str]:
    name = row["variant"] if row["variant"] == BASE else f"{row['variant']} {row['release']}"
    start = [name, str(row["seeds"]), f"{row['accuracy']:.1f}"]
    over = [_points(row["over_mean"], row["over_mean_low"], row["over_mean_high"])]
    if "gain" not in row:
        return [*start, *[NOTHING] * 7, *over]
    return [
        *start,
        signed(row["gain"]),
        _range(row["low"], row["high"]),
        _range(row["runs_low"], row["runs_high"]),
        _range(row["sets_low"], row["sets_high"]),
        signed(row["median"]),
        f"{row['wins']} of {row['sets']}",
        NOTHING if row["standard_error"] is None else f"{row['standard_error']:.1f}",
        *over,
    ]


def _points(mean: float | None, low: float | None, high: float | None) -> str:
    return NOTHING if mean is None else f"{signed(mean)} {_range(low, high)}"


def _range(low: float | None, high: float | None) -> str:
    return NOTHING if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def releases_table(records: Records, protocol: str) -> Table:
    """The curve as numbers: each release of the mean."""
    rows = []
    for number in records.measured.releases(MEAN, protocol):
        place = Place(MEAN, number)
        effort = records.effort.get(place)
        gains = [records.gain(g, protocol=protocol, release=number) for g in GROUPS]
        rows.append(
            [
                str(number),
                *(NOTHING if gain is None else str(gain) for gain in gains),
                *(NOTHING if gain is None else _by_seed(gain) for gain in gains),
                NOTHING if effort is None else size(effort.bytes),
            ]
        )
    return Table(
        "Releases in numbers",
        f"Gain of each release of the plain mean over the base ({PROTOCOLS[protocol]}), with the "
        "95 % interval within the sets, and the gain of each seed by itself.",
        ["release", "seen", "unseen", "seen, by seed", "unseen, by seed", "shipped so far"],
        rows,
        frozenset(range(6)),
    )


def _by_seed(found: Comparison) -> str:
    return " / ".join(signed(gain) for gain in found.by_seed.values())


def sets_table(records: Records, protocol: str, group: str) -> Table | None:
    """What each set gained, with its sign, and what they say together."""
    found = records.gain(group, protocol=protocol)
    if found is None:
        return None
    rows = []
    for task, gain in sorted(found.gains.items(), key=lambda item: (-item[1], item[0])):
        before = records.measured.of_set(PRETRAINED, protocol, task)
        after = records.measured.of_set(found.of, protocol, task)
        examples = found.sets[task].shape[2]
        levels = [NOTHING if level is None else f"{level:.1f}" for level in (before, after)]
        rows.append([task, str(examples), *levels, signed(gain), str(found.of_set(task))])
    rows += [["mean", "", "", "", signed(found.mean), str(found.interval)]]
    if found.sets_interval is not None:
        across = str(found.sets_interval)
        rows += [["mean, across sets", "", "", f"SE {found.error:.1f}", signed(found.mean), across]]
    rows += [["median", "", "", "", signed(found.median), ""]]
    rows += [["won", "", "", "", f"{found.wins} of {len(found.sets)}", ""]]
    return Table(
        f"Each {group} set",
        f"{found.of} against {found.against}, {PROTOCOLS[protocol]}, {len(found.seeds)} "
        f"seed{'s'[: len(found.seeds) != 1]}, {found.draws} draws; points. A set's own interval is "
        "over its test examples.",
        ["set", "test examples", "base", "last release", "gain", "95 %"],
        rows,
        frozenset(range(1, 6)),
    )


def cost_table(rows: Sequence[Row], protocol: str) -> Table:
    """Bytes and seconds, and what a point of gain cost."""
    seen, unseen = (
        {r["variant"]: r for r in rows if (r["protocol"], r["group"]) == (protocol, group)}
        for group in GROUPS
    )
    told = []
    for name in dict.fromkeys([*seen, *unseen]):
        row = seen.get(name) or unseen[name]
        if row["bytes"] is None or name == BASE:
            continue
        rates = [its[name]["seconds_per_point"] if name in its else None for its in (seen, unseen)]
        told.append(
            [
                f"{name} {row['release']}",
                SHIPPED.get(name) or size(row["bytes"]),
                f"{row['train_seconds']:,.0f}",
                *(NOTHING if rate is None else f"{rate:,.0f}" for rate in rates),
            ]
        )
    return Table(
        "What it cost",
        "Up to the last release, all contributors together, the mean over seeds: bytes that "
        "contributors shipped, seconds of training on one core, and those seconds for each point "
        "gained over the base (a dash where nothing was gained).",
        ["variant", "shipped", "seconds", "seconds per seen point", "per unseen point"],
        told,
        frozenset(range(1, 5)),
    )


def size(count: float) -> str:
    """Bytes for people: `88.4 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count:.0f} B"


def distance_table(records: Records) -> Table | None:
    """How far the mean is from training on everybody's data in one place."""
    rows = []
    for protocol in records.protocols:
        for group in GROUPS:
            found = records.over_mean(group, MULTITASK, protocol)
            bound = records.gain(group, MULTITASK, protocol)
            if found is None or bound is None:
                continue
            mean = records.measured.compare(found.against, PRETRAINED, protocol, group)
            share = f"{100 * mean.mean / bound.mean:.0f} %" if mean and bound.mean > 0 else NOTHING
            row = [PROTOCOLS[protocol], group, str(bound), str(mean or NOTHING), str(found), share]
            rows.append(row)
    if not rows:
        return None
    return Table(
        "Distance to centralized training",
        "Multitask training on the pooled data, as many gradient steps: what sharing the data "
        "would have given. The last column is how much of its gain the mean reaches without.",
        ["protocol", "sets", "multitask", "mean", "multitask over mean", "reached"],
        rows,
        frozenset(range(2, 6)),
    )


def policies_table(records: Records, protocol: str) -> Table | None:
    """Round policies against the plain mean, best first."""
    found = [
        (name, [records.over_mean(group, name, protocol) for group in GROUPS])
        for name in records.policies
    ]
    there = [(name, pair) for name, pair in found if any(pair)]
    if not there:
        return None
    there.sort(key=lambda item: -fmean(one.mean for one in item[1] if one))
    rows = [[name, *_policy(records, pair)] for name, pair in there]
    return Table(
        "Round policies",
        f"Each policy's last release against the plain mean after as many steps, in pairs "
        f"({PROTOCOLS[protocol]}), best first. The first line is best by luck too: the next table "
        "says what is left of it on sets that did not choose it.",
        ["policy", "seen over mean", "unseen over mean", "seeds", "shipped", "seconds"],
        rows,
        frozenset(range(1, 6)),
    )


def _policy(records: Records, pair: Sequence[Comparison | None]) -> list[str]:
    one = next(found for found in pair if found)
    effort = records.effort.get(one.of)
    cost = [NOTHING] * 2 if effort is None else [size(effort.bytes), f"{effort.seconds:,.0f}"]
    return [*(str(found or NOTHING) for found in pair), str(len(one.seeds)), *cost]


def choice_table(records: Records) -> Table | None:
    """Which policy each rotation chose, and what it gained where it was not chosen."""
    choice = records.choice
    if choice is None:
        return None
    gains = choice.rotated.gains
    rows = [
        [", ".join(fold), name, signed(fmean(gains[task] for task in fold))]
        for fold, name in choice.by_fold
    ]
    rows.append(["all of them, by rotation", NOTHING, str(choice.rotated)])
    if choice.held is not None:
        rows.append([f"held out: {', '.join(choice.held.gains)}", choice.chosen, str(choice.held)])
    return Table(
        "The best round policy",
        "The sets of a line took no part in choosing its policy: the others did. The plain mean "
        "may be chosen, and then gains nothing over itself. Each group counts half.",
        ["reported on", "chosen by the others", "over mean"],
        rows,
        frozenset({2}),
        frozenset({0}),
    )


def studies_table(records: Records, protocol: str) -> Table | None:
    """Contributors, examples, LoRA, coefficients: what varies one thing."""
    names: Iterable[str] = [
        *(one.variant for study in (COHORT, EXAMPLES) for one in records.sized(study)),
        *records.named(LORA),
        *records.named(COEFFICIENTS),
    ]
    rows = []
    for name in names:
        pair = [records.gain(group, name, protocol) for group in GROUPS]
        if any(pair):
            rows.append([name, *_policy(records, pair)])
    if not rows:
        return None
    plain = [records.gain(group, MEAN, protocol) for group in GROUPS]
    if any(plain):
        rows.insert(0, [MEAN, *_policy(records, plain)])
    return Table(
        "One thing at a time",
        f"Gain over the pretrained base at the last release ({PROTOCOLS[protocol]}): numbers of "
        "contributors and of examples, LoRA task vectors, coefficients among unequal contributors.",
        ["variant", "seen", "unseen", "seeds", "shipped", "seconds"],
        rows,
        frozenset(range(1, 6)),
    )
