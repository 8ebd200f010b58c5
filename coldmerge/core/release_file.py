"""`coldmerge-release.json`: what a release's folder says about itself, signed."""

from __future__ import annotations

import base64
import json

from coldmerge.core.digests import Content
from coldmerge.core.documents import Signed

RELEASE_FILE = "coldmerge-release.json"


def render_release_file(signed: Signed | None, signing_key: str, content: Content) -> bytes:
    """The file's bytes. A candidate has no record: `signed` is None.

    `document` holds, in base64, the exact bytes that `signature` is over; `signing_key`
    is the coordinator's public key in hexadecimal.
    """
    document, signature = (signed.document, signed.signature) if signed else (b"", b"")
    body = {
        "record": json.loads(document) if document else None,
        "document": base64.b64encode(document).decode(),
        "signature": base64.b64encode(signature).decode(),
        "signing_key": signing_key,
        "listing": content.to_json(),
    }
    return (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()
