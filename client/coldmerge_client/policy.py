"""What may leave this machine, decided by its owner.

The allow-list itself is not a setting: only tensors of the release that match none of
the model's private patterns can leave, in any policy. `policy.yaml` in the home folder
can only narrow that:

    require_approval: true        ask a person before anything made from data leaves
    private: ["encoder.layer.11.*"]   keep these at home as well
    encoding: bf16                half the bytes, slightly rounded
    max_bytes: 500000000          refuse to send more than this
    metrics: false                send no training metrics

One key widens it, and only for rounds whose merge method asks for it: statistics say more
about the data than weights do, so they stay here until their owner agrees.

    may_send: [fisher, gram]      Fisher information, Gram matrices of activations

Another lets the gate's search for a bad update look at ours alone, in rounds that ask for it:
whoever sees the candidates with and without it can compute it.

    allow_leave_one_out: true

A third lets a round learn what ours alone is multiplied by: the candidates of its probes show it
just as well. Without it we share a coefficient with others.

    allow_learn_coefficients: true
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coldmerge.core import strict_json, yaml_file
from coldmerge.core.documents import (
    LEARN_COEFFICIENTS,
    LEAVE_ONE_OUT,
    Consent,
    Encoding,
    Statistic,
)
from coldmerge.core.errors import ConfigError, IntegrityError
from coldmerge.core.validation import first_problem


def said(round_policy: str) -> dict[str, Any]:
    """What a round's policy (JSON, as the coordinator sent it) says.

    Raises:
        IntegrityError: it is not what a coordinator sends.
    """
    return _tables(round_policy)


def section(round_policy: str, name: str) -> dict[str, Any]:
    """What a section of a round's policy says; empty, if it is not there.

    Raises:
        IntegrityError: it is not what a coordinator sends.
    """
    return _tables(round_policy, name)


def _tables(round_policy: str, *names: str) -> dict[str, Any]:
    """The table at `names`, each inside the one before."""
    try:
        found = strict_json.loads(round_policy or "{}")
        for name in names:
            found = found.get(name) or {}
        return dict(found)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            "push.bad_round_policy",
            f"The coordinator sent a round whose policy cannot be read: {error}.",
            expected="a JSON object of sections",
            got=round_policy[:80],
            hint="Compare `coldmerge --version` on both sides, and ask the coordinator's admin.",
        ) from error


class SendPolicy(BaseModel):
    """The owner's limits on what leaves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    require_approval: bool = False
    private: tuple[str, ...] = ()
    encoding: Encoding = "fp32"
    max_bytes: int | None = Field(default=None, gt=0)
    metrics: bool = True
    may_send: tuple[Literal["fisher", "gram"], ...] = ()
    allow_leave_one_out: bool = False
    allow_learn_coefficients: bool = False

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `path`; without a file the defaults hold.

        Raises:
            ConfigError: the file is not YAML or has a wrong key or value.
        """
        if not path.exists():
            return cls()
        try:
            return cls.model_validate(yaml_file.load(path) or {})
        except ValidationError as error:
            first = first_problem(error)
            problem = f"{first.key}: {first.text}."
        except (OSError, yaml.YAMLError) as error:
            problem = str(error)
        raise ConfigError(
            "policy.bad_file",
            f"The sending policy cannot be read: {problem}",
            expected=", ".join(cls.model_fields),
            hint=f"Correct {path}; nothing is sent until it can be read.",
            path=path,
        )

    def keeps(self, kind: Statistic) -> bool:
        """Whether a statistic stays here. Trim thresholds follow from the deltas: they may go."""
        return kind != "trim" and kind not in self.may_send

    def consents(self, round_policy: str) -> tuple[Consent, ...]:
        """What we agree to in a round whose policy (JSON) asks for it."""
        singles = section(round_policy, "gate").get("isolate_singles")
        learns = section(round_policy, "merge").get("coefficients")
        asked: dict[Consent, object] = {LEAVE_ONE_OUT: singles, LEARN_COEFFICIENTS: learns}
        return tuple(one for one, wanted in asked.items() if wanted and self.allows(one))

    def allows(self, consent: Consent) -> bool:
        """Whether we agree to it, where a round asks."""
        if consent == LEARN_COEFFICIENTS:
            return self.allow_learn_coefficients
        return self.allow_leave_one_out

    def narrowed(self, *, require_approval: bool = False, encoding: Encoding | None = None) -> Self:
        """The same policy with the stricter of two answers on approval, and another encoding."""
        return self.model_copy(
            update={
                "require_approval": self.require_approval or require_approval,
                "encoding": encoding or self.encoding,
            }
        )
