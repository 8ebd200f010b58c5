"""What is demanded of this software (R), and what we claim of it (O)."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cold.answers import (
    FAILS,
    HOLDS,
    UNMEASURED,
    Answer,
    against_oneshot,
    best_of,
    ends,
    missing,
    peak_said,
    reached,
    sided,
    unequal,
)
from benchmarks.cold.comparison import Comparison, signed
from benchmarks.cold.outcome import ONESHOT
from benchmarks.cold.records import COEFFICIENTS, LORA, LP100, Records

ROUNDS, SHAPE_ROUNDS, DRAWS = 3, 5, 3


def after(records: Records, group: str, protocol: str, rounds: int) -> Comparison | Answer:
    """The gain of the mean after so many rounds, or why there is none."""
    found = records.gain(group, protocol=protocol, release=rounds)
    if found is not None:
        return found
    last = records.gain(group, protocol=protocol)
    if last is None:
        return missing(f"no {protocol} of the mean and the base on {group} sets")
    note = f"{last.of} is the last release measured; asked after {rounds} rounds"
    return Answer(UNMEASURED, last.mean, last.interval, str(last), [note])


def _told(records: Records, answer: Answer) -> Answer:
    """Says where another setting was trained than the demand is for."""
    if not records.parts.get("cheap"):
        return answer
    return replace(answer, notes=[*answer.notes, "the cheap setting, not the whole body"])


def seen_probe(records: Records) -> Answer:
    """R1: gain of the mean on seen sets under a linear probe."""
    found = after(records, "seen", LP100, ROUNDS)
    return found if isinstance(found, Answer) else _told(records, reached(found, 5.0))


def unseen_probe(records: Records) -> Answer:
    """R2: the same on unseen sets."""
    found = after(records, "unseen", LP100, ROUNDS)
    if isinstance(found, Answer):
        return found
    every = all(gain > 0 for gain in found.by_seed.values())
    return _told(records, reached(found, 1.0, extra=every))


def unseen_few_shot(records: Records) -> Answer:
    """R3: gain of the mean on unseen sets in 100-shot fine-tuning."""
    found = records.gain("unseen", protocol="ft100")
    if found is None:
        return missing("no ft100 of the mean and the base on unseen sets")
    return _told(records, reached(found, 0.5, draws=DRAWS))


def iterating(records: Records) -> Answer:
    """R4: rounds against one shot."""
    seen = against_oneshot(records, "seen")
    if seen is None:
        return missing(f"no {ONESHOT}mean")
    unseen = against_oneshot(records, "unseen")
    answer = reached(seen, 1.0, extra=unseen is not None and unseen.mean >= 0)
    figure = f"seen {seen}, unseen {'–' if unseen is None else unseen}"
    notes = [*answer.notes, *unequal(records, seen)]
    return replace(answer, figure=figure, notes=notes)


def shape(records: Records) -> Answer:
    """R5: the curve on seen sets."""
    gains = [records.gain("seen", release=release) for release in (1, 3, SHAPE_ROUNDS)]
    first, third, fifth = gains
    if first is None or third is None or fifth is None:
        return missing(f"no releases 1, 3 and {SHAPE_ROUNDS} of the mean on seen sets")
    rise = records.measured.compare(fifth.of, third.of, LP100, "seen")
    figure = " / ".join(signed(found.mean) for found in (first, third, fifth))
    ok = fifth.mean > third.mean > first.mean
    mean, interval = (rise.mean, rise.interval) if rise else (None, None)
    notes = [f"release 5 over release 3: {rise}" if rise else "", peak_said(records)]
    return Answer(HOLDS if ok else FAILS, mean, interval, figure, [n for n in notes if n])


def best_policy(records: Records) -> Answer:
    """O1: the round policy that other sets chose, against the plain mean."""
    choice = records.choice
    if choice is None:
        return missing("no round policy beside the mean")
    verdict = choice.verdict
    where = "on the sets held out" if choice.held else "each set by a choice made without it"
    chosen = ", ".join(dict.fromkeys(name for _, name in choice.by_fold))
    notes = [f"{where}; rotations chose {chosen}, all sets together {choice.chosen}"]
    return sided(verdict.mean, verdict.interval, str(verdict), notes)


def learned_coefficients(records: Records) -> Answer:
    """O2: the best of the learned coefficients against uniform ones."""
    names = records.named(COEFFICIENTS)
    uniform = next((name for name in names if name.endswith("uniform")), None)
    learned = [name for name in names if name != uniform]
    if uniform is None or not learned:
        return missing("needs uniform and learned coefficients")
    found = [one for name in learned if (one := ends(records, name, uniform)) is not None]
    if not found:
        return missing("uniform and learned coefficients have no set or seed in common")
    best = max(found, key=lambda one: one.mean)
    interval, how = best_of(best, len(found))
    notes = [*(f"{one.of.variant}: {one}" for one in found), *how]
    figure = f"{best.of.variant} {signed(best.mean)} {interval}"
    return sided(best.mean, interval, figure, notes)


def lora(records: Records) -> Answer:
    """O3: gain and bytes of LoRA task vectors."""
    name = next(iter(records.named(LORA)), None)
    found = records.gain("seen", name) if name else None
    if name is None or found is None:
        return missing("no run with LoRA task vectors")
    plain = records.measured.counterpart(found.of, records.effort, LP100)
    sizes = [records.effort[p].bytes for p in (found.of, plain) if p and p in records.effort]
    notes = [f"{found.of} against the base"]
    if len(sizes) == 2 and sizes[1]:
        notes.append(f"{100 * sizes[0] / sizes[1]:.1f} % of the bytes of {plain}")
    return sided(found.mean, found.interval, str(found), notes)
