"""Failures of stores: which of them are transient, and what a person is told, on one line and without credentials.

Errors are told apart by name, so that neither botocore nor aiohttp is imported if storage is local.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from pipelines.errors import TransientError, UserError
from pipelines.secrets import without_secrets

# What a person must be allowed to do with our own storage, and with the files of others.
OWNING = "list, read, write and delete"
READING = "list and read"
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


class MissingFileError(UserError):
    """A file that should be there is not."""


def is_transient(error: BaseException) -> bool:
    """Tell whether the same request can succeed later: throttling, failures of servers, of the network, of DNS."""
    error = _origin(error)
    code, status = code_and_status(error)
    if code:
        return status in TRANSIENT_STATUSES or code in TRANSIENT_CODES
    if (
        isinstance(error, TimeoutError | ConnectionError | socket.gaierror)
        or getattr(error, "errno", None) == errno.EBUSY
    ):
        return True
    names = {each.__name__ for each in type(error).__mro__}
    return _library(error) == "aiohttp" or (_library(error) is not None and bool(names & TRANSIENT_ERRORS))


def must_restart(error: BaseException) -> bool:
    """Tell whether the whole upload must begin again: repeating this one request of it cannot succeed."""
    return code_and_status(error)[0] in RESTART_CODES


def code_and_status(error: BaseException) -> tuple[str, int]:
    """Return a store's answer as its error code and HTTP status; ("", 0) if it did not answer."""
    origin = _origin(error)
    response = getattr(origin, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return str(response.get("Error", {}).get("Code", status)), int(status)
    # A plain web server answers with a status alone.
    status = getattr(origin, "status", None) if _library(origin) == "aiohttp" else None
    return (str(status), status) if isinstance(status, int) and status else ("", 0)


def explain_failure(url: str, error: BaseException, *, rights: str = OWNING) -> UserError | None:
    """Explain a store's failure on one line.

    Args:
        url: the file or folder that was asked for.
        error: what the store's library raised.
        rights: what one must be allowed to do there, for the advice if the store forbids it.

    Returns:
        None for what is no failure of a store, and for a file that is not there.
    """
    origin = _origin(error)
    code, status = code_and_status(origin)
    name = type(origin).__name__
    answer = code if code == str(status) else f"{code} {status}"
    if str(origin).startswith("Invalid endpoint"):
        return UserError(f"{url}: AWS_ENDPOINT_URL is not a URL; set it to one such as https://s3.example.org")
    if code == "NoSuchBucket":
        return UserError(f"the bucket of {url} does not exist: create it, or choose another URL")
    if code in CREDENTIAL_CODES:
        return UserError(f"the store of {url} refuses the credentials ({code}): renew them, or choose another profile")
    if status == 403:
        return UserError(f"no permission for {url} ({code}): it takes the right to {rights}")
    if is_transient(origin):
        return TransientError(
            f"{url} cannot be reached ({reason_of(origin)}): check the network and the store's endpoint, then run the "
            "same command again; what is committed is kept"
        )
    if must_restart(origin):
        return UserError(f"{url} could not be written ({code}): does another program write there?")
    if isinstance(error, FileNotFoundError):
        return None
    if code:
        return UserError(f"the store of {url} refuses the request ({answer}): check the URL and the endpoint")
    if _library(origin) and ("Credential" in name or name.startswith(CREDENTIAL_ERRORS)):
        return UserError(
            f"no credentials for {url}: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({name})"
        )
    if _library(origin):
        return UserError(f"{url} cannot be used ({name}): check the URL and the settings of the store")
    return None


def reason_of(error: BaseException) -> str:
    """Return a store's answer, or what kept it from answering, in a few words without credentials."""
    origin = _origin(error)
    code, status = code_and_status(origin)
    return (code if code == str(status) else f"{code} {status}") if code else _cause_in_words(origin)


@contextlib.contextmanager
def readable(url: str) -> Iterator[None]:
    """Turn whatever goes wrong while somebody else's file is read into one line.

    Raises:
        UserError: the file is missing or cannot be read; with the reason and what to do.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise MissingFileError(f"{url} is missing") from None
    # Foreign files pass through many libraries, each with errors of its own.
    except Exception as error:
        raise explain_failure(url, error, rights=READING) or _unreadable(url, error) from None


def _unreadable(url: str, error: Exception) -> UserError:
    reason = " ".join(without_secrets(f"{type(error).__name__}: {error}").split())[:200]
    return UserError(f"{url} cannot be read ({reason}): check its address, access to it and the network")


def _origin(error: BaseException) -> BaseException:
    """Return the library's error behind the OSError that s3fs makes of it."""
    cause = error.__cause__
    if cause is None:
        return error
    # fsspec says of whatever goes wrong with a web server that the file is not there.
    missing = isinstance(error, FileNotFoundError) and _library(cause) == "aiohttp"
    behind = hasattr(cause, "response") or (missing and getattr(cause, "status", None) not in (404, 410))
    return cause if behind else error


def _library(error: BaseException) -> str | None:
    modules = [each.__module__.partition(".")[0] for each in type(error).__mro__]
    return next((module for module in modules if module in LIBRARIES), None)


def _cause_in_words(error: BaseException) -> str:
    # Host and port alone: a URL may hold a password.
    endpoint = urlsplit(str(getattr(error, "kwargs", {}).get("endpoint_url", "")))
    place = f" at {endpoint.hostname}" + (f":{endpoint.port}" if endpoint.port else "") if endpoint.hostname else ""
    return type(error).__name__ + place
