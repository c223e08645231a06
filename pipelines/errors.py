"""Errors that a user can mend, as opposed to bugs: one line each, with an exit code."""

import errno
from collections.abc import Iterator
from typing import TypeVar

from pipelines.secrets import without_secrets

E = TypeVar("E", bound=BaseException)

# A full disk in the words of safetensors, and of torch.save, which never names its reason.
DISK_FULL_WORDS = (("No space left on device",), ("inline_container.cc", "unexpected pos"))
DISK_FULL_ADVICE = "free some space and run the same command again; everything committed is kept"


class UserError(Exception):
    """The work cannot go on: a missing source, a full disk, a damaged shard. Exit code 1.

    The message names the invariant, the value received and the fix, on one line. Secrets in it are hidden: what other
    libraries say is often part of it.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class MisuseError(UserError):
    """The request itself is wrong: an unknown key, a bad option. Exit code 2."""

    exit_code = 2


class TransientError(UserError):
    """A store or the network did not recover within the patience of whoever asked. Exit code 1.

    Nobody has to mend anything but the store: the same work may succeed later, so that training is never ended by it.
    """


class LoaderDiedError(Exception):
    """A process that makes batches is gone, killed by somebody or for want of memory: training begins anew."""


def explain(error: BaseException) -> UserError | None:
    """Return the UserError behind an exception, looking through what Ray and `raise … from` wrap around it.

    None if there is none: the exception is then a bug and deserves its traceback.
    """
    for current in _chain(error):
        if isinstance(current, UserError):
            return current
        if isinstance(current, OSError) and (known := _explain_os_error(current)):
            return known
        if any(all(word in str(current) for word in words) for words in DISK_FULL_WORDS):
            return UserError(f"disk full: {DISK_FULL_ADVICE}")
    return None


def raised_as_user_error(error: BaseException) -> UserError | None:
    """Return the UserError that was raised as such behind an exception; not what `explain` makes of a full disk."""
    return found_behind(error, UserError)


def found_behind(error: BaseException, kind: type[E]) -> E | None:
    """Return the exception of a kind that is behind another one, or is it; None if there is none."""
    return next((found for found in _chain(error) if isinstance(found, kind)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, each once, the most informative first."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        # What Ray Core raises is also of the class of the task's exception, but its text is a whole traceback.
        if isinstance(cause := getattr(current, "cause", None), BaseException):
            waiting.append(cause)
            continue
        yield current
        waiting += reversed(_inner(current))


def _inner(error: BaseException) -> list[BaseException]:
    """Return the causes of an exception, the most informative first."""
    # Ray Train: the failures of the workers by rank, that of its controller, a worker's exception with its traceback.
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    wrapped = [getattr(error, name, None) for name in ("controller_failure", "_base_exc")]
    inner = [failures[rank] for rank in sorted(failures)] + wrapped + [error.__cause__ or error.__context__]
    return [found for found in inner if found is not None]


def _explain_os_error(error: OSError) -> UserError | None:
    place = f" at {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return UserError(f"disk full{place}: {DISK_FULL_ADVICE}")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission to write{place}: choose another --root or change its permissions")
    return None
