"""Secrets in URLs: found, so that such URLs are refused, and taken out of every text that is shown."""

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

# A password may hold slashes, as those of S3 do. A port is no password, and the colons of an IPv6 address are none.
_PASSWORD = r"://[^/@\s:\[\]]*:(?!\d+(?:[/?#\s'\",;)]|$))\S*@"
# Over HTTP a user without a password is a token.
_TOKEN = r"https?://[^/@\s]+@"
_NAME = (
    r"(?:[\w.-]*(?:password|passwd|passphrase|pwd|secret|token|signature|credentials?"
    r"|(?:api|access|account|shared|private|auth)[_-]?key)|auth|key|pass|sig)"
)
_PARAMETER = rf"(?P<name>[?&;#]{_NAME}=)[^&;#\s'\",)]+"
_IN_URLS = re.compile(rf"(?P<before>{_PASSWORD}|{_TOKEN})|{_PARAMETER}", re.IGNORECASE)
_CONNECTION_STRING = re.compile(r"(?:^|;)(?:AccountKey|SharedAccessKey|SharedAccessSignature)=.", re.IGNORECASE)

_SECRET_VARIABLE = re.compile(r"(?:PASSWORD|PASSWD|TOKEN|SECRET|_KEY)$")
# Values shorter than this would be found in ordinary words.
_SHORTEST_VALUE = 8

_TRACKING_ADVICE = (
    "leave it out and set MLFLOW_TRACKING_URI in the environment, or name the server alone and set "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN (for a database: PGPASSWORD or "
    "~/.pgpass)"
)
_CLUSTER_ADVICE = "set RAY_AUTH_TOKEN in the environment"
_STORAGE_ADVICE = "keep credentials in the environment or in a profile (AWS_PROFILE)"


def holds_secret(value: str) -> bool:
    """Tell whether a URL or connection string holds a password, a token, a key or a signature."""
    if "://" in value:
        # A password may hold spaces, which end a URL only in running text.
        return _IN_URLS.search(re.sub(r"\s", "+", value)) is not None
    return _CONNECTION_STRING.search(value) is not None


def find_secret(value: Any) -> list[str] | None:
    """Return the path of names to the first string with a secret in nested mappings and sequences, or None."""
    if isinstance(value, str):
        return [] if holds_secret(value) else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, item in items:
        if (path := find_secret(item)) is not None:
            return [str(name), *path]
    return None


def refusal(field: str) -> str:
    """Return what a person is told whose `field` (of a recipe or a command) holds a secret: where it belongs."""
    advice = _STORAGE_ADVICE
    if "tracking" in field:
        advice = _TRACKING_ADVICE
    elif "address" in field:
        advice = _CLUSTER_ADVICE
    return f"{field} must not hold a password, token or signature, which logs and reports would show: {advice}"


def without_secrets(text: str) -> str:
    """Return text with *** for the secrets of its URLs, and for those of this process's environment."""
    for secret in _known_secrets():
        text = text.replace(secret, HIDDEN)
    return _IN_URLS.sub(_hide, text)


def _hide(match: re.Match[str]) -> str:
    if match["name"]:
        return f"{match['name']}{HIDDEN}"
    # The user's name stays where a password follows it; alone it would be the token.
    scheme, _, userinfo = match["before"].partition("://")
    user, colon, _ = userinfo.partition(":")
    return f"{scheme}://{user}:{HIDDEN}@" if colon else f"{scheme}://{HIDDEN}@"


def _known_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_VALUE:
            yield value
    # Libraries quote it without the rest of the URI, and decoded.
    if found := re.search(r"://[^/@:]*:(.*)@", os.environ.get("MLFLOW_TRACKING_URI", ""), re.DOTALL):
        yield from (each for each in (found[1], unquote(found[1])) if len(each) >= _SHORTEST_VALUE)
