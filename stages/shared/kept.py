"""Finished results under a second name, because DVC deletes and replaces its outs.

`dvc repro` deletes the outs of a stage before it runs it, and `dvc exp run` first puts the results that it knows in
place of newer ones. Images prepared from a folder, or days of training, would be gone. So whatever a command finishes
is kept where DVC never looks:

    data/work/kept/<recipe>/<stage>.json       what decided the result, the code that made it, its files, the date
    data/work/kept/<recipe>/<stage>/<number>/  hard links to the files, or copies where links fail

There is one for each stage. A newer one takes its place when the JSON is replaced, which names the folder: a kill at
any moment leaves one that is whole. A command that finds its result missing, or an older one in its place, puts the
kept one back if the same settings, inputs and code made it; else it does its work again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError, StorageError
from pipeline.report.watching import LOG
from pipeline.system.canonical import fingerprint
from pipeline.system.storage import (
    duplicate,
    lock,
    read_json,
    remove_leftovers,
    sha256_file,
    storage_errors,
    write_json,
)
from pipeline.training.manifest import MANIFEST, read_manifest
from stages.shared.dvc_file import code_digest
from stages.shared.paths import Paths

if TYPE_CHECKING:
    from stages.shared.context import Context

FORMAT = 1
UNKNOWN = "unknown"  # instead of a digest of the code
# About a minute, for another process that keeps or puts back the same result.
LOCK_ATTEMPTS = 1200
# Of each file this much tells results apart: it has the SHA-256 that prepared data, checkpoints and labels begin with
# or have in the JSON beside them.
_TELLING_BYTES = 2**20
_UNTELLING = ("run.json", LOG, MANIFEST)  # times and device, which differ between equal results, and digests of these
_MAX_EARLIER = 50


@dataclass(frozen=True)
class Result:
    """What a DVC stage makes.

    Attributes:
        recipe: The recipe's name.
        stage: The stage's name, as `teacher@vgg16`.
        fingerprint: SHA-256 of the settings and inputs that decide it.
        out: Where people find it.
        paths: All of its files. It is complete once the last is there.
        amounts: Of what it may hold more or less, as labelled views: what it holds, or the least that is asked for.
        lock: The lock that its writers hold; None where the caller holds it.
        code: Digest of the code that makes it.
        project: The project's folder, see Paths.
    """

    recipe: str
    stage: str
    fingerprint: str
    out: Path
    paths: tuple[Path, ...]
    amounts: Mapping[str, int] = field(default_factory=dict)
    lock: Path | None = None
    code: str = ""
    project: Path = Path()

    def __post_init__(self) -> None:
        if not self.code:  # as it is before the work begins: the files may be edited while it goes on
            object.__setattr__(self, "code", code_digest(self.stage))

    @property
    def places(self) -> Paths:
        """Where the recipe's files lie."""
        return Paths(self.recipe, self.project)

    @property
    def files(self) -> list[Path]:
        """The files that are there."""
        return [path for path in self.paths if path.is_file()]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A result that is kept, as its JSON says.

    Attributes:
        fingerprint: See `Result`.
        code: Digest of the code that its stage depends on, when it was made.
        date: When it was finished, UTC, ISO 8601.
        folder: The number of the folder of its files.
        files: For each file its path below data/<recipe>, `path`, its `size` and its `sha256`, in the order in which
            they are put back.
        identity: See `_identity`.
        amounts: See `Result`.
        earlier: The dates of what was kept before, by identity.
    """

    fingerprint: str
    code: str
    date: str
    folder: str
    files: list[dict[str, Any]]
    identity: str
    amounts: dict[str, int]
    earlier: dict[str, str]

    @property
    def when(self) -> str:
        """The date for people."""
        return _for_people(self.date)

    def first_other(self, root: Path) -> Path | None:
        """Return a file below a folder that is missing or not what was kept; None where all are."""
        for file in self.files:
            path: Path = root / file["path"]
            if not path.is_file() or path.stat().st_size != file["size"] or sha256_file(path) != file["sha256"]:
                return path
        return None


def keep(context: Context, result: Result) -> None:
    """Keep a result that has just been finished, in place of the one kept before; if that fails, say so and go on."""
    entry = _Entry.of(result)
    try:
        with storage_errors(f"keep {result.out}"), entry.claimed():
            entry.replace(result)
    except StorageError as error:
        context.say(f"{result.out}: finished, but DVC can delete it, for it has no second name: {error}")


def keep_if_first(context: Context, result: Result) -> None:
    """Keep a result of which nothing is kept, and of which nobody knows what code made it, as after `dvc pull`."""
    if _Entry.of(result).read() is None:
        keep(context, dataclasses.replace(result, code=UNKNOWN))


def find(result: Result, *, any_code: bool = False) -> Kept | None:
    """Return the kept result that the same settings, inputs and code made, and that holds enough; None without one.

    Args:
        result: What is asked for.
        any_code: Whether other code may have made it.
    """
    kept = _Entry.of(result).read()
    if kept is None or kept.fingerprint != result.fingerprint:
        return None
    if any(kept.amounts.get(name, 0) < least for name, least in result.amounts.items()):
        return None
    return kept if any_code or kept.code == result.code else None


def folder_of(result: Result, kept: Kept) -> Path:
    """Return the folder in which the files of a kept result lie as below data/<recipe>."""
    return _Entry.of(result).folder / kept.folder


def put_back(context: Context, result: Result, *, any_code: bool = False) -> bool:
    """Put back a kept result, see `find`, that is missing or out of date, and say so.

    Returns:
        Whether it is there now, whole.

    Raises:
        StorageError: Linking or copying failed, or another run is making the result.
    """
    entry = _Entry.of(result)
    if find(result, any_code=any_code) is None:
        return False
    with contextlib.nullcontext() if result.lock is None else lock(result.lock), entry.claimed():
        kept = find(result, any_code=any_code)
        if kept is None:
            return False
        if (damaged := kept.first_other(entry.folder / kept.folder)) is not None:
            context.say(f"{damaged}: not what was kept, so that {result.out} is not put back")
            return False
        if kept.first_other(result.places.root) is None:  # another rank has put it back
            return True
        entry.restore(kept, result)
    code = "" if kept.code == result.code else ", perhaps by other code than today's"
    context.say(f"{result.out}: put back as it was finished on {kept.when}{code}")
    context.changed(result.stage)
    return True


def mend(context: Context, result: Result | None, why: str | None) -> str | None:
    """Put a result back that is missing or out of date; of one that stands, say whether a newer one is kept.

    Args:
        context: The command's setting.
        result: None is never kept.
        why: Why it does not stand; None if it does.

    Returns:
        Why it does not stand now; None if it does.
    """
    if result is None:
        return why
    if why is not None:
        return None if put_back(context, result) else why
    say_if_older(context, result)
    return None


def say_if_older(context: Context, result: Result, *, any_code: bool = False) -> None:
    """Say so if the result that is there is older than the kept one, see `find`."""
    kept = find(result, any_code=any_code)
    if kept is None or (date := kept.earlier.get(_identity(result))) is None:
        return
    context.say(
        f"{result.out}: this is what was finished on {_for_people(date)}; a newer result, of "
        f"{kept.when}, is kept; to get it back: rm -r {result.out}, and this command again"
    )


def holds(result: Result) -> bool:
    """Tell whether what is there is what is kept, made by the code of today."""
    kept = find(result)
    return kept is not None and kept.identity == _identity(result)


def is_of_other_code(result: Result) -> bool:
    """Tell whether what is there is known to be made by other code than today's."""
    kept = find(result, any_code=True)
    return kept is not None and kept.code not in (result.code, UNKNOWN) and kept.identity == _identity(result)


@dataclass(frozen=True)
class Space:
    """Disk space of what is kept.

    Attributes:
        count: Number of results.
        total: Bytes of their files.
        own: Bytes that nothing else names, and that are free once the kept names are removed.
    """

    count: int
    total: int
    own: int


def space(recipe: str | None = None) -> Space:
    """Measure what is kept of a recipe, or of all."""
    count = total = own = 0
    for entry in _entries(recipe):
        count += entry.file.is_file()
        for file in entry.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if file.is_file():
                    stat = file.stat()
                    total += stat.st_size
                    own += stat.st_size if stat.st_nlink == 1 else 0
    return Space(count, total, own)


def remove(recipe: str | None = None) -> Space:
    """Remove what is kept of a recipe, or of all, and return what it took.

    Raises:
        StorageError: Something cannot be removed, or is being kept or put back.
    """
    before = space(recipe)
    for entry in _entries(recipe):
        with entry.claimed(), storage_errors(f"remove {entry.file}"):
            entry.file.unlink(missing_ok=True)
            _remove_folder(entry.folder)
    return before


@dataclass(frozen=True)
class _Entry:
    """Where the kept result of a stage lies."""

    paths: Paths
    stage: str

    @classmethod
    def of(cls, result: Result) -> _Entry:
        return cls(result.places, result.stage)

    @property
    def folder(self) -> Path:
        """Holds the folder of its files, and those that killed processes left."""
        return self.paths.kept / self.stage

    @property
    def file(self) -> Path:
        """The JSON."""
        return self.folder.with_name(f"{self.stage}.json")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        with lock(self.folder.with_name(f"{self.stage}.lock"), attempts=LOCK_ATTEMPTS):
            yield

    def read(self) -> Kept | None:
        """Return what the JSON says; None where it is missing, or is not what `replace` writes."""
        try:
            content = dict(read_json(self.file))
            if content.pop("format") != FORMAT:
                return None
            kept = Kept(**content)
            texts = [kept.fingerprint, kept.code, kept.date, kept.folder, kept.identity, *kept.earlier.values()]
            texts += [file[key] for file in kept.files for key in ("path", "sha256")]
            numbers = [file["size"] for file in kept.files] + list(kept.amounts.values())
            paths = [Path(file["path"]) for file in kept.files]
        except (DataError, StorageError, TypeError, ValueError, KeyError, AttributeError):
            return None
        # It may come from anywhere with the folder; what it names is replaced.
        is_within = all(not path.is_absolute() and ".." not in path.parts for path in paths)
        is_typed = all(isinstance(text, str) for text in texts) and all(isinstance(number, int) for number in numbers)
        return kept if paths and is_within and is_typed and re.fullmatch("[0-9a-f]+", kept.folder) else None

    def replace(self, result: Result) -> None:
        """Keep a result instead of what is kept."""
        former = self.read()
        self._remove_all_but(former)
        root, number = self.paths.root, secrets.token_hex(4)
        files, known = [], _digests(result.out)
        for file in result.paths:  # if DVC deletes one meanwhile, the former one stays
            path = file.relative_to(root)
            second = self.folder / number / path
            duplicate(file, second)
            digest = known.get(file) or sha256_file(second)
            files.append({"path": str(path), "size": second.stat().st_size, "sha256": digest})
        earlier = {**former.earlier, former.identity: former.date} if former is not None else {}
        identity = _identity(result)
        earlier.pop(identity, None)
        kept = Kept(
            fingerprint=result.fingerprint,
            code=result.code,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            folder=number,
            files=files,
            identity=identity,
            amounts=dict(result.amounts),
            earlier=dict(sorted(earlier.items(), key=lambda item: item[1])[-_MAX_EARLIER:]),
        )
        write_json(self.file, {"format": FORMAT, **dataclasses.asdict(kept)})
        self._remove_all_but(kept)

    def _remove_all_but(self, kept: Kept | None) -> None:
        """Remove the folders that the JSON does not name: what was kept before, and what killed processes left."""
        remove_leftovers(self.file)
        with contextlib.suppress(FileNotFoundError):
            for folder in self.folder.iterdir():
                if kept is None or folder.name != kept.folder:
                    _remove_folder(folder)

    def restore(self, kept: Kept, result: Result) -> None:
        """Put the files of a result in their places, in place of all that are there."""
        root = self.paths.root
        with storage_errors(f"put back {result.out}"):
            for file in reversed(result.files):  # first the one that makes a result of them
                file.unlink(missing_ok=True)
        for name in (file["path"] for file in kept.files):
            remove_leftovers(root / name)
            duplicate(self.folder / kept.folder / name, root / name)


def _remove_folder(folder: Path) -> None:
    if not folder.exists():
        return
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    folder.rmdir()


def _digests(out: Path) -> dict[Path, str]:
    """Return the SHA-256 that a result's manifest names: of what was written, whatever has become of it."""
    with contextlib.suppress(DataError):
        manifest = read_manifest(out) if out.is_dir() else None
        if manifest is not None:
            return {out / name: digest for name, digest in manifest.files.items()}
    return {}


def _for_people(date: str) -> str:
    return f"{date[:16].replace('T', ' ')} UTC"


def _entries(recipe: str | None) -> Iterable[_Entry]:
    """Return where something is kept, or lies half kept."""
    pattern = "*" if recipe is None else recipe
    paths = [path for path in Paths.kept_of_all().glob(f"{pattern}/*") if not path.name.startswith(".")]
    # A folder's name may hold dots: a label file's is that of a teacher.
    found = {path.with_suffix("") if path.suffix == ".json" else path for path in paths if path.suffix != ".lock"}
    return [_Entry(Paths(path.parent.name), path.name) for path in sorted(found)]


def _identity(result: Result) -> str:
    """Return a digest that tells the result that is there from others; its times do not count."""
    root, telling = result.places.root, {}
    for file in result.files:
        if file.name not in _UNTELLING:
            with storage_errors(f"read {file}"), file.open("rb") as opened:
                start = opened.read(_TELLING_BYTES)
            telling[str(file.relative_to(root))] = [file.stat().st_size, hashlib.sha256(start).hexdigest()]
    return fingerprint(telling)
