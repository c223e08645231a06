"""What went wrong with an object store: whether it may pass, and how to say it without credentials.

Errors are told apart by name, so that neither botocore nor aiohttp is imported where storage is local.
"""

from __future__ import annotations

import errno
from urllib.parse import urlsplit

from pipelines.errors import UserError

LIBRARIES = {"botocore", "aiobotocore", "aiohttp"}
TRANSIENT_ERRORS = {"HTTPClientError", "ConnectionError", "ResponseStreamingError", "ResponseParserError"}
TRANSIENT_STATUSES = {408, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
# An upload that is no longer there must begin anew: its last answer was lost, or another writer of this file tidied up.
RESTART_CODES = {"NoSuchUpload", "InvalidPart"}
CREDENTIAL_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
CREDENTIAL_ERRORS = ("SSO", "Token", "ProfileNotFound")


def is_transient(error: BaseException) -> bool:
    """Whether the same request can succeed later."""
    error = _origin(error)
    code, status = code_and_status(error)
    if code:
        return status in TRANSIENT_STATUSES or code in TRANSIENT_CODES
    if isinstance(error, TimeoutError | ConnectionError) or getattr(error, "errno", None) == errno.EBUSY:
        return True
    names = {each.__name__ for each in type(error).__mro__}
    return _library(error) == "aiohttp" or (_library(error) is not None and bool(names & TRANSIENT_ERRORS))


def must_restart(error: BaseException) -> bool:
    """Whether the request cannot succeed again, but the whole upload that it belongs to can."""
    return code_and_status(error)[0] in RESTART_CODES


def code_and_status(error: BaseException) -> tuple[str, int]:
    """What an S3 store answered, as its error code and HTTP status; ("", 0) where it did not answer."""
    response = getattr(_origin(error), "response", None)
    if not isinstance(response, dict):
        return "", 0
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", status)), int(status)


def explain_failure(url: str, error: BaseException) -> UserError | None:
    """A store's failure as one line; None for everything else, and for a file that is not there."""
    origin = _origin(error)
    code, status = code_and_status(origin)
    name = type(origin).__name__
    if str(origin).startswith("Invalid endpoint"):
        return UserError(f"{url}: AWS_ENDPOINT_URL is not a URL; set it to one such as https://s3.example.org")
    if code == "NoSuchBucket":
        return UserError(f"the bucket of {url} does not exist: create it, or choose another URL")
    if code in CREDENTIAL_CODES:
        return UserError(f"the store of {url} refuses the credentials ({code}): renew them, or choose another profile")
    if status == 403:
        return UserError(f"no permission for {url} ({code}): it takes the right to list, read, write and delete")
    if is_transient(origin):
        reason = f"{code} {status}" if code else _cause_in_words(origin)
        return UserError(
            f"{url} cannot be reached ({reason}): check the network and the store's endpoint, then run the same "
            "command again; what is committed is kept"
        )
    if must_restart(origin):
        return UserError(f"{url} could not be written ({code}): does another program write there?")
    if isinstance(error, FileNotFoundError):
        return None
    if code:
        return UserError(f"the store of {url} refuses the request ({code} {status}): check the URL and the endpoint")
    if _library(origin) and ("Credential" in name or name.startswith(CREDENTIAL_ERRORS)):
        return UserError(
            f"no credentials for {url}: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({name})"
        )
    if _library(origin):
        return UserError(f"{url} cannot be used ({name}): check the URL and the settings of the store")
    return None


def _origin(error: BaseException) -> BaseException:
    """The library's error behind what s3fs made of it."""
    cause = error.__cause__
    return cause if cause is not None and hasattr(cause, "response") else error


def _library(error: BaseException) -> str | None:
    modules = [each.__module__.partition(".")[0] for each in type(error).__mro__]
    return next((module for module in modules if module in LIBRARIES), None)


def _cause_in_words(error: BaseException) -> str:
    # Host and port alone: a URL may hold a password.
    endpoint = urlsplit(str(getattr(error, "kwargs", {}).get("endpoint_url", "")))
    place = f" at {endpoint.hostname}" + (f":{endpoint.port}" if endpoint.port else "") if endpoint.hostname else ""
    return type(error).__name__ + place
