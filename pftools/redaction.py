"""Secrets stay out of what is kept: notebooks, causes of failures, reports."""

from __future__ import annotations

import json
import os
import re

from pftools.settings import HUB_TOKEN

_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)


def redact(text: str) -> str:
    """The text without the values of secret environment variables, and without what looks like a token of the
    hub."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8]
    for secret in secrets:
        for form in (secret, json.dumps(secret)[1:-1]):
            text = text.replace(form, "[redacted]")
    return HUB_TOKEN.sub("[redacted]", text)
