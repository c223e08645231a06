"""What lies under a root: its runs and its artifacts, by few requests however many files they have.

A listing for each stage, and of each artifact its manifest and a look for two small files; sizes are the manifests'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from pipelines.errors import UserError
from pipelines.run.plan import STAGE_NAMES
from pipelines.run.runs import RUNS, RunState, read_state
from pipelines.store.ledger import LEDGER, LOCKS, SUPERSEDED, TRACKING, Ledger
from pipelines.store.lock import Holder, find_holder
from pipelines.store.manifest import MANIFEST, Manifest, read_manifest
from pipelines.store.storage import Storage
from pipelines.store.threads import map_in_threads

# Small requests at once.
READERS = 32

RunCondition = Literal["running", "running?", "finished", "failed", "killed"]
# `deleted`: superseded, and removed by `ldm gc` but for the file that says so.
Condition = Literal["finished", "superseded", "deleted", "being made", "being made?", "unfinished"]


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Attributes:
        id: its folder's name.
        state: what its `run.json` says.
        condition: how it is; `running?` if nobody can tell whether its driver lives.
    """

    id: str
    state: RunState
    condition: RunCondition


@dataclass(frozen=True)
class ArtifactFacts:
    """One artifact.

    Attributes:
        stage, key: which it is.
        condition: how it is; `being made?` if nobody can tell whether its driver lives.
        manifest: None if it is not finished, or deleted.
        since: when it was finished, or begun if it is not, in seconds since 1970; None if nothing says so.
        holder: who makes it, or adds to it.
        used_by: the runs that stand on it, and the finished artifacts that were made from it, `run ID` and `STAGE KEY`.
    """

    stage: str
    key: str
    condition: Condition
    manifest: Manifest | None
    since: float | None
    holder: Holder | None
    used_by: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Its folder, below the root."""
        return f"{self.stage}/{self.key}"

    @property
    def upstream(self) -> Iterator[tuple[str, str]]:
        """Stage and key of the artifacts that it was made from."""
        if self.manifest is None:
            return
        for stage, reference in self.manifest.upstream.items():
            yield stage, key_of(reference)
        # Named by their folders, not by a stage: they may be of another root.
        for mixed in self.manifest.details.get("mix", ()):
            yield mixed["stage"], mixed["key"]


@dataclass(frozen=True)
class Catalogue:
    """All runs, the newest first; all artifacts, by stage and key; who holds which lock, by its name."""

    runs: list[RunFacts]
    artifacts: list[ArtifactFacts]
    locks: Mapping[str, Holder | None]


def key_of(reference: str) -> str:
    """Return the key in a reference, which may have a growth counter."""
    return reference.partition("+")[0]


def open_root(url: str) -> Ledger:
    """Return the ledger of a root.

    Raises:
        UserError: it is of another version, or no root at all.
    """
    ledger = Ledger(Storage(url))
    ledger.require_version(STAGE_NAMES)
    if not ledger.root.exists(LEDGER):
        raise UserError(
            f"{ledger.root.url} is not the root of a run ({LEDGER} is missing): give a folder as --root had"
        )
    return ledger


def read_catalogue(root: Storage) -> Catalogue:
    """Look through a root.

    Raises:
        UserError: a manifest or the state of a run cannot be read.
    """
    folders = (*STAGE_NAMES, RUNS, LOCKS)
    names = dict(zip(folders, map_in_threads(lambda folder: (root / folder).names(), folders, READERS)))
    lock_folders = [root / LOCKS / name for name in names[LOCKS]]
    locks = dict(zip(names[LOCKS], map_in_threads(find_holder, lock_folders, READERS)))
    states = dict(read_states(root, names[RUNS]))
    runs = [RunFacts(name, state, _condition(state, locks.get(f"run-{name}"))) for name, state in states.items()]
    places = [(stage, key) for stage in STAGE_NAMES for key in names[stage]]
    artifacts = list(map_in_threads(partial(_artifact, root, locks), places, READERS))
    users = users_of(states, artifacts)
    return Catalogue(runs, [replace(each, used_by=tuple(users[each.stage, each.key])) for each in artifacts], locks)


def read_states(root: Storage, names: Iterable[str]) -> Iterator[tuple[str, RunState]]:
    """Yield the names of runs and what they say of themselves, the newest first.

    Raises:
        UserError: one of them cannot be read.
    """
    ordered = sorted(names, reverse=True)
    read = map_in_threads(lambda name: read_state(root / RUNS / name), ordered, READERS)
    return ((name, state) for name, state in zip(ordered, read) if state is not None)


def users_of(
    states: Mapping[str, RunState], artifacts: Iterable[ArtifactFacts]
) -> defaultdict[tuple[str, str], list[str]]:
    """Return by stage and key who refers to an artifact: runs by their states, and finished artifacts."""
    users: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, state in states.items():
        for stage in state.stages:
            users[stage.name, stage.key].append(f"run {name}")
    for artifact in artifacts:
        for upstream in artifact.upstream:
            users[upstream].append(f"{artifact.stage} {artifact.key}")
    return users


def _condition(state: RunState, holder: Holder | None) -> RunCondition:
    if state.state != "running":
        return state.state
    if holder is None or holder.alive is False:
        return "killed"
    return "running" if holder.alive else "running?"


def _artifact(root: Storage, locks: Mapping[str, Holder | None], place: tuple[str, str]) -> ArtifactFacts:
    stage, key = place
    folder, holder = root / stage / key, locks.get(f"{stage}-{key}")
    finished_at = _written(folder, MANIFEST)
    manifest = None if finished_at is None else read_manifest(folder)
    since = _written(folder, TRACKING) if finished_at is None else finished_at
    condition: Condition
    if folder.exists(SUPERSEDED):
        condition = "superseded" if manifest else "deleted"
    elif holder and holder.alive is not False:
        condition = "being made" if holder.alive else "being made?"
    else:
        condition = "finished" if manifest else "unfinished"
    return ArtifactFacts(stage, key, condition, manifest, since, holder)


def _written(folder: Storage, name: str) -> float | None:
    try:
        return folder.modified_at(name)
    except FileNotFoundError:
        return None
