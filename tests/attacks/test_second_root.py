"""An invitation whose root holds a second certificate: TLS would trust both, people compare one."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from coldmerge.core.errors import ConfigError
from coldmerge.wire.invitation import Invitation
from coldmerge_coordinator.identity import make_root
from tests.support import START


@pytest.mark.parametrize("first", [True, False])
def test_a_second_root_beside_the_right_one(first: bool) -> None:
    right, evil = (
        make_root(name, START)[1].public_bytes(Encoding.PEM).decode() for name in ("hub", "evil")
    )
    true = Invitation(federation="hub", address="a:1", enrol="a:2", token="t" * 43, root=right)
    assert Invitation.parse(true.render()) == true
    forged = true.model_copy(update={"root": right + evil if first else evil + right})
    if first:
        assert forged.fingerprint == true.fingerprint  # what the contributor was told still fits
    with pytest.raises(ConfigError) as caught:
        Invitation.parse(forged.render())
    assert caught.value.code == "invitation.malformed"
