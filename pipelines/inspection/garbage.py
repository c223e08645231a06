"""What under a root is of no more use, and its removal.

Nothing goes that a run stands on, that a finished artifact was made from, or that somebody holds: whatever belongs to
an artifact or a run is removed while its lock is held, after another look. A removal that is killed leaves nothing that
looks whole, and the next one goes on with it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

from pipelines.errors import MisuseError, UserError
from pipelines.inspection.catalogue import (
    READERS,
    ArtifactFacts,
    Catalogue,
    read_catalogue,
    read_states,
    users_of,
)
from pipelines.inspection.scratch import abandoned, remove_abandoned
from pipelines.run.plan import STAGE_NAMES
from pipelines.run.runs import RUNS, RunState
from pipelines.store.commits import COMMITS
from pipelines.store.ledger import DETAILS, LOCKS, SUPERSEDED, WORK
from pipelines.store.local_disk import leftovers
from pipelines.store.location import FileFacts
from pipelines.store.lock import HeldError, discard, exclusive
from pipelines.store.manifest import MANIFEST, read_manifest
from pipelines.store.object_store import Upload
from pipelines.store.storage import Storage
from pipelines.store.threads import map_in_threads

DAY_S = 86_400
# Artifacts removed at once.
_REMOVERS = 8

Kind = Literal["run", "superseded", "unfinished", "leftovers", "table", "upload", "temporaries", "scratch", "lock"]


@dataclass(frozen=True)
class Garbage:
    """Something of no more use.

    Attributes:
        kind: what it is.
        place: where, below the root; of scratch a local path.
        why: why it may go.
        files, bytes: how much.
        lock: name of the lock that is held while it is removed.
        newest: when the youngest file of it was written, in seconds since 1970.
        upload: the upload that it is, if it is one.
    """

    kind: Kind
    place: str
    why: str
    files: int = 0
    bytes: int = 0
    lock: str | None = None
    newest: float = 0.0
    upload: Upload | None = None


@dataclass(frozen=True)
class Kept:
    """Something that would go, and why it stays: place, reason, and how much it holds."""

    place: str
    why: str
    bytes: int = 0


@dataclass(frozen=True)
class Findings:
    """What may go, and what else would."""

    garbage: list[Garbage]
    kept: list[Kept]


def find_garbage(root: Storage, older_than_s: float, forget: Collection[str] = ()) -> Findings:
    """Look for what is of no more use.

    Args:
        root: the root.
        older_than_s: unfinished work that a run can go on with goes when nothing was written for so long.
        forget: runs that do not count, and go themselves.

    Raises:
        MisuseError: a run to forget is not there.
        UserError: it is at work, or a manifest or the state of a run cannot be read.
    """
    return _Search(root, read_catalogue(root), older_than_s, frozenset(forget)).run()


class _Search:
    def __init__(self, root: Storage, catalogue: Catalogue, older_than_s: float, forget: frozenset[str]) -> None:
        self.root, self.catalogue, self.older_than_s, self.forget = root, catalogue, older_than_s, forget
        self.now = time.time()
        self.states = {run.id: run.state for run in catalogue.runs if run.id not in forget}
        self.users = users_of(self.states, ())
        self.garbage: list[Garbage] = []
        self.kept: list[Kept] = []

    def run(self) -> Findings:
        self._forgotten_runs()
        self._count_users()
        idle = [each for each in self.catalogue.artifacts if each.condition not in ("being made", "being made?")]
        for garbage, kept in map_in_threads(self._of_artifact, idle, READERS):
            self.garbage += garbage
            self.kept += kept
        self._uploads()
        if self.root.is_local:
            self._temporaries()
        self.garbage += [
            Garbage("scratch", str(each.path), "its process has ended", each.files, each.bytes)
            for each in abandoned(self.now - DAY_S)
        ]
        self._locks()
        return Findings(self.garbage, self.kept)

    def _forgotten_runs(self) -> None:
        runs = {run.id: run for run in self.catalogue.runs}
        for name in sorted(self.forget):
            if name not in runs:
                raise MisuseError(f"no run {name} under {self.root.url}: `ldm ls {self.root.url}` names them")
            if runs[name].condition in ("running", "running?"):
                raise UserError(f"run {name} under {self.root.url} is at work: stop it before you forget it")
            facts = (self.root / RUNS / name).files_below()
            self.garbage.append(
                Garbage("run", f"{RUNS}/{name}", "forgotten", len(facts), _bytes(facts), lock=f"run-{name}")
            )

    def _count_users(self) -> None:
        """Add to the users of each artifact those that were made from it and stay: from the last stage back."""
        for artifact in reversed(self.catalogue.artifacts):
            if artifact.condition == "superseded" and not self._users(artifact):
                continue
            for upstream in artifact.upstream:
                self.users[upstream].append(f"{artifact.stage} {artifact.key}")
            if artifact.condition in ("being made", "being made?") and artifact.holder:
                self.kept.append(Kept(artifact.place, f"{artifact.holder.name} is making it"))

    def _users(self, artifact: ArtifactFacts) -> list[str]:
        return self.users[artifact.stage, artifact.key]

    def _of_artifact(self, artifact: ArtifactFacts) -> tuple[list[Garbage], list[Kept]]:
        if artifact.condition == "unfinished":
            return self._unfinished(artifact)
        if artifact.condition == "finished":
            return self._beside_finished(artifact)
        return self._superseded(artifact)

    def _superseded(self, artifact: ArtifactFacts) -> tuple[list[Garbage], list[Kept]]:
        if artifact.manifest is None:
            # What is left of a removal that was killed.
            facts = self._files(artifact)
            facts.pop(SUPERSEDED, None)
            return ([self._garbage("superseded", artifact, "superseded", facts)] if facts else []), []
        manifest = artifact.manifest
        if users := self._users(artifact):
            return [], [Kept(artifact.place, f"superseded, but {_named(users)}", manifest.bytes)]
        return [
            Garbage(
                "superseded",
                artifact.place,
                "superseded, and nothing refers to it",
                manifest.files,
                manifest.bytes,
                lock=_lock_of(artifact),
            )
        ], []

    def _unfinished(self, artifact: ArtifactFacts) -> tuple[list[Garbage], list[Kept]]:
        facts = self._files(artifact)
        why = self._why_abandoned(artifact, facts)
        if why is None:
            return [], [Kept(artifact.place, self._why_kept(artifact), _bytes(facts))]
        return [self._garbage("unfinished", artifact, f"unfinished, {why}", facts)], []

    def _beside_finished(self, artifact: ArtifactFacts) -> tuple[list[Garbage], list[Kept]]:
        garbage, kept = [], []
        facts = self._files(artifact, f"{COMMITS}/") | self._files(artifact, f"{WORK}/")
        if facts:
            why = self._why_abandoned(artifact, facts)
            if why is None:
                kept.append(Kept(artifact.place, self._why_kept(artifact), _bytes(facts)))
            else:
                garbage.append(self._garbage("leftovers", artifact, f"{COMMITS} and {WORK}, {why}", facts))
        if facts := self._old_tables(artifact):
            garbage.append(self._garbage("table", artifact, "tables of files that the manifest does not name", facts))
        return garbage, kept

    def _old_tables(self, artifact: ArtifactFacts) -> dict[str, FileFacts]:
        assert artifact.manifest is not None
        at_work = {run.id for run in self.catalogue.runs if run.condition in ("running", "running?")}
        if any(user.removeprefix("run ") in at_work for user in self._users(artifact)):
            # It may have read the manifest before.
            return {}
        return _old_tables(self.root / artifact.place, artifact.manifest.table, self.now - DAY_S)

    def _why_abandoned(self, artifact: ArtifactFacts, facts: Mapping[str, FileFacts]) -> str | None:
        """Return why nobody will go on with what is unfinished; None if somebody may."""
        if not _continued_by(self.states, artifact.stage, artifact.key):
            return "and no run goes on with it"
        if not facts:
            return "and empty"
        newest = _newest(facts)
        if self.now - newest >= self.older_than_s:
            return f"and untouched for {(self.now - newest) / DAY_S:.1f} days"
        return None

    def _why_kept(self, artifact: ArtifactFacts) -> str:
        run = _continued_by(self.states, artifact.stage, artifact.key)[0]
        return f"run {run} can go on with it (--forget {run})"

    def _files(self, artifact: ArtifactFacts, beginning: str = "") -> dict[str, FileFacts]:
        return (self.root / artifact.place).files_below(beginning)

    def _garbage(self, kind: Kind, artifact: ArtifactFacts, why: str, facts: Mapping[str, FileFacts]) -> Garbage:
        size, newest = _bytes(facts), _newest(facts)
        return Garbage(kind, artifact.place, why, len(facts), size, _lock_of(artifact), newest)

    def _uploads(self) -> None:
        start = f"{self.root.path().rstrip('/')}/"
        # Of one whose store does not say when it began nobody knows whether it goes on.
        old = [each for each in self.root.unfinished_uploads() if 0 < each.begun < self.now - DAY_S]
        for upload, size in zip(old, map_in_threads(self.root.uploaded_bytes, old, READERS)):
            place = upload.path.removeprefix(start)
            if not self._is_held(lock := _lock_at(place)):
                why = "an upload that was never completed"
                self.garbage.append(Garbage("upload", place, why, 1, size, lock, upload.begun, upload))

    def _temporaries(self) -> None:
        found = [(path.relative_to(self.root.url).as_posix(), size) for path, size in self._old_leftovers()]
        for lock, group in groupby(sorted(found, key=lambda each: _lock_at(each[0]) or ""), lambda e: _lock_at(e[0])):
            if not self._is_held(lock):
                files = list(group)
                place = "/".join(files[0][0].split("/")[:2]) if lock else "."
                why = "temporary files of writers that were killed"
                self.garbage.append(
                    Garbage("temporaries", place, why, len(files), sum(size for _, size in files), lock)
                )

    def _old_leftovers(self) -> list[tuple[Path, int]]:
        return leftovers(Path(self.root.path()), self.now - DAY_S)

    def _is_held(self, lock: str | None) -> bool:
        holder = self.catalogue.locks.get(lock) if lock else None
        return holder is not None and holder.alive is not False

    def _locks(self) -> None:
        """Find the locks that nobody holds and nobody will miss."""
        unfinished = {_lock_of(each) for each in self.catalogue.artifacts if each.condition == "unfinished"}
        unfinished |= {f"run-{name}" for name, state in self.states.items() if state.state != "finished"}
        # They go with what they guard.
        unfinished |= {each.lock for each in self.garbage if each.lock}
        idle = [name for name in self.catalogue.locks if name not in unfinished and not self._is_held(name)]
        self.garbage += [Garbage("lock", f"{LOCKS}/{name}", "nobody holds it", lock=name) for name in idle]


def delete(root: Storage, findings: Findings) -> list[Kept]:
    """Remove what was found; return what stays because somebody uses it by now.

    Raises:
        UserError: something cannot be removed. What is left is found the next time.
    """
    left: list[Kept] = []
    # Runs first, which keep artifacts; and what was made from an artifact goes before it.
    for folder in (RUNS, *reversed(STAGE_NAMES), ""):
        batches: defaultdict[str, list[Garbage]] = defaultdict(list)
        for each in findings.garbage:
            head = each.place.partition("/")[0]
            if folder == (head if head in (RUNS, *STAGE_NAMES) else ""):
                batches[each.lock or each.place].append(each)
        for kept in map_in_threads(partial(_delete, root), batches.values(), _REMOVERS):
            left += kept
    return left


def _delete(root: Storage, batch: list[Garbage]) -> list[Kept]:
    """Remove what one lock guards, or nothing does; return what stays."""
    lock = batch[0].lock
    if lock is None:
        return [_changed(each) for each in batch if not _REMOVE[each.kind](root, each)]
    place = root / LOCKS / lock
    try:
        with exclusive(place, what=batch[0].place):
            left = [_changed(each) for each in batch if not _REMOVE[each.kind](root, each)]
            discard(place)
    except HeldError as error:
        return [Kept(each.place, str(error).partition(": wait for it")[0], each.bytes) for each in batch]
    return left


def _changed(each: Garbage) -> Kept:
    return Kept(each.place, "it has changed since it was looked at", each.bytes)


def _remove_run(root: Storage, each: Garbage) -> bool:
    (root / each.place).remove()
    return True


def _remove_superseded(root: Storage, each: Garbage) -> bool:
    storage = root / each.place
    if not storage.exists(SUPERSEDED) or _referring_runs(root, each):
        return False
    # First, so that what is left after a kill never looks whole.
    storage.remove(MANIFEST)
    # Without it the key would stand for a generation again, and what replaced it would be forgotten.
    storage.remove_all_but(SUPERSEDED)
    return True


def _remove_unfinished(root: Storage, each: Garbage) -> bool:
    storage = root / each.place
    if storage.exists(MANIFEST) or _newest(storage.files_below()) > each.newest:
        return False
    # Records before files: a file that is missing is made again, unless a record says that it was there.
    for name in (DETAILS, COMMITS, ""):
        storage.remove(name)
    return True


def _remove_leftovers(root: Storage, each: Garbage) -> bool:
    storage = root / each.place
    facts = storage.files_below(f"{COMMITS}/") | storage.files_below(f"{WORK}/")
    if not storage.exists(MANIFEST) or _newest(facts) > each.newest:
        return False
    for name in (COMMITS, WORK):
        storage.remove(name)
    return True


def _remove_tables(root: Storage, each: Garbage) -> bool:
    storage = root / each.place
    if not storage.exists(MANIFEST):
        return False
    storage.remove_files(list(_old_tables(storage, read_manifest(storage).table, each.newest + 1)))
    return True


def _remove_upload(root: Storage, each: Garbage) -> bool:
    assert each.upload is not None
    root.abort_upload(each.upload)
    return True


def _remove_temporaries(root: Storage, each: Garbage) -> bool:
    folder = Path((root / each.place).path()) if each.lock else Path(root.path())
    for path, _ in leftovers(folder, time.time() - DAY_S):
        if _lock_at(path.relative_to(root.url).as_posix()) == each.lock:
            path.unlink(missing_ok=True)
    return True


def _remove_scratch(root: Storage, each: Garbage) -> bool:
    remove_abandoned(Path(each.place))
    return True


def _remove_nothing(root: Storage, each: Garbage) -> bool:
    """The lock that is held goes."""
    return True


_REMOVE: dict[Kind, Callable[[Storage, Garbage], bool]] = {
    "run": _remove_run,
    "superseded": _remove_superseded,
    "unfinished": _remove_unfinished,
    "leftovers": _remove_leftovers,
    "table": _remove_tables,
    "upload": _remove_upload,
    "temporaries": _remove_temporaries,
    "scratch": _remove_scratch,
    "lock": _remove_nothing,
}


def _referring_runs(root: Storage, each: Garbage) -> list[str]:
    stage, key = each.place.split("/")
    states = dict(read_states(root, (root / RUNS).names()))
    return users_of(states, ())[stage, key]


def _continued_by(states: Mapping[str, RunState], stage: str, key: str) -> list[str]:
    """Return the runs that have begun an artifact, or an addition to it, and have not ended well."""
    return [
        name
        for name, state in states.items()
        if state.state != "finished"
        and any((each.name, each.key, each.reference) == (stage, key, None) for each in state.stages)
    ]


def _old_tables(storage: Storage, current: str, before: float) -> dict[str, FileFacts]:
    found = storage.files_below("files-")
    return {
        name: facts
        for name, facts in found.items()
        if name.endswith(".parquet") and name != current and facts.written < before
    }


def _lock_of(artifact: ArtifactFacts) -> str:
    return f"{artifact.stage}-{artifact.key}"


def _lock_at(place: str) -> str | None:
    """Return the lock of the artifact or run that a path below the root belongs to; None if it is no one's."""
    head, _, rest = place.partition("/")
    name = rest.partition("/")[0]
    if head in STAGE_NAMES and name:
        return f"{head}-{name}"
    return f"run-{name}" if head == RUNS and name else None


def _named(users: list[str]) -> str:
    """Say who refers to an artifact, and what to do if that shall not count."""
    runs = [user.removeprefix("run ") for user in users if user.startswith("run ")]
    others = [user for user in users if not user.startswith("run ")]
    made = f"{', '.join(others)} was made from it" if others else ""
    stand = f"run {', '.join(runs)} stands on it ({' '.join(f'--forget {run}' for run in runs)})" if runs else ""
    return " and ".join(filter(None, (stand, made)))


def _bytes(facts: Mapping[str, FileFacts]) -> int:
    return sum(each.size for each in facts.values())


def _newest(facts: Mapping[str, FileFacts]) -> float:
    return max((each.written for each in facts.values()), default=0.0)
