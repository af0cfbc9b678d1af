"""Prepared data that are there: whether they are what a recipe's images would give now, and how they are kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.recipes import Recipe, deciding_values
from pipeline.errors import DataError, PipelineError, StorageError, UsageError, printable
from pipeline.system.canonical import canonical_json, fingerprint, is_sha256
from pipeline.system.storage import lock, read_json, remove_leftovers, write_atomic
from pipeline.system.text import counted
from stages.shared import kept
from stages.shared.paths import Paths
from stages.shared.runs import State, differences

if TYPE_CHECKING:
    from pipeline.data.digests import Seen
    from pipeline.data.listing import Listing
    from stages.shared.context import Context

# Raised where the same folder gives other images, splits or classes: what was prepared before is then made again.
READER = 2
# Half a minute, for another process that writes what it remembers.
LOCK_ATTEMPTS = 600


def check_prepared(
    recipe: Recipe, paths: Paths, *, folder: Path | None = None, download: bool = False, remember: bool = True
) -> State:
    """Say whether the prepared data are what `prepare` would make now, and write nothing there.

    They are if they are whole, of the recipe's settings, and of the same images. A folder's images are compared by
    relative path, size and content; contents are read again only where size or time of change differ from what is
    remembered. Data whose source cannot be read now are kept: as after `dvc pull`, or without the `--from` that they
    were made with.

    Args:
        recipe: The recipe.
        paths: Its files.
        folder: What `--from` names; None takes the recipe's `path` or the source's own files.
        download: Whether `--download` is given.
        remember: Whether to write sizes, times and SHA-256 of a folder's files to `paths.prepare_memory`.

    Returns:
        Done: `up to date`, or `kept` and why. Or not done, and why: then `prepare` has something to do.

    Raises:
        UsageError: Both a folder and a download are given, or `folder` does not exist.
        DataError: The folder is no image folder.
        StorageError: A file cannot be read, or nothing can be remembered.
    """
    from pipeline.data.file import FORMER_FILE
    from pipeline.data.listing import list_source

    place = find_place(recipe, folder, download=download)
    summary = read_summary(paths.prepared) if paths.is_prepared else None
    if summary is None:
        is_former = paths.dataset.with_name(FORMER_FILE).exists()
        return State("in place of one of a former layout" if is_former else "no data yet")
    if changed := differences({"settings": summary.get("settings")}, {"settings": deciding_values(recipe.dataset)}):
        return State(f"in place of one of other settings: {', '.join(changed)}")
    if (damage := damage_of(paths, summary)) is not None:
        return State(f"in place of one that is {damage}")
    former = summary.get("folder")
    if place is None:
        if former is None:
            return State("up to date, of the same settings", is_done=True)
        if download:
            return State(f"in place of one of the folder {former}")
        return State(f"kept, of the same settings; it is of the folder {former}, which was not named now", True)
    if folder is None and not place.exists():
        where = f"recipes.{recipe.name}.dataset.path"
        return State(f"kept, of the same settings; {where}: {printable(place)} does not exist here", is_done=True)
    listing = list_source(place)
    digest, seen = digest_files(listing, paths.prepare_memory)
    is_same = digest == summary.get("source_sha256")
    if remember:  # a folder that is read-only now costs time alone
        with contextlib.suppress(StorageError) if is_same else contextlib.nullcontext():
            remember_files(listing, seen, paths.prepare_memory)
    if is_same and summary.get("reader") == READER:
        left_out = f"; {not_used(listing.left_out.as_json())}" if listing.left_out.names else ""
        return State(f"up to date, of the same settings and images{left_out}", is_done=True)
    if is_same or former is None:
        return State("in place of one of the same settings, of the source's own files or by a former version")
    return State(f"in place of one of the same settings and other images, of {former}")


def plan_prepare(
    recipe: Recipe, paths: Paths, *, folder: Path | None, download: bool, skip_bad: bool, fresh: bool = False
) -> list[str]:
    """Say what `prepare` would do, and write nothing; images are not decoded.

    Raises:
        UsageError: See `prepare`.
        DataError: Files are missing, or the folder is no image folder, or not the source that the recipe names.
    """
    from pipeline.data.sources import TORCHVISION_CLASSES, check_known, check_source

    state = check_prepared(recipe, paths, folder=folder, download=download, remember=False)
    if state.is_done and not fresh:
        return [f"{paths.dataset}: {state.text}"]
    place, source, lines = find_place(recipe, folder, download=download), recipe.dataset.source, []
    if place is not None:
        listing = list_place(recipe, place, paths.raw, is_named=folder is not None)
        lines = [*check_known(source, listing.class_names, listing.counts), *listing.notes]
        if listing.left_out.names:
            lines.append(not_used(listing.left_out.as_json()))
        counts = ", ".join(f"{count} {split}" for split, count in listing.counts.items())
        num_classes = counted(len(listing.class_names), "class")
        what = f"{counts} images of {num_classes} in {printable(place)}, which are not opened yet"
        if listing.bad:
            what += f"; {counted(len(listing.bad), 'other file')}, " + (
                "left out" if skip_bad else "for which it is refused"
            )
    elif download and source in TORCHVISION_CLASSES:
        what = f"{source} in {paths.raw}, downloading what is missing"
    else:
        check_source(recipe, paths.raw)
        what = f"{source} in {paths.raw}" if source in TORCHVISION_CLASSES else f"the bundled {source}"
    return [f"read {what}", *lines, f"write {paths.dataset} ({state.text})"]


def check_available(context: Context) -> str | None:
    """Say which kept data `prepare` would put back; None where it would read the recipe's own source.

    Raises:
        UsageError: The source is `folder`, and nothing is kept.
        DataError: The source's files are missing, and nothing is kept.
    """
    from pipeline.data.sources import check_source

    second = kept.find(kept_data(context), any_code=not can_be_read(context))
    if second is None:
        check_source(context.recipe, context.paths.raw)
        return None
    return f"put back what was finished on {second.when}"


def kept_data(context: Context) -> kept.Result:
    """Describe a recipe's prepared data as they are kept: its settings and the layout decide whether they fit."""
    from pipeline.data.file import NAMES, SCHEMA

    out, settings = context.paths.prepared, deciding_values(context.recipe.dataset)
    decides = fingerprint({"settings": settings, "schema": SCHEMA})
    files = (*(out / name for name in NAMES if (out / name).is_file()), out / "summary.json")
    return kept.Result(context.recipe.name, "prepare", decides, out, files, lock=lock_of(out), project=context.project)


def keep_prepared(context: Context) -> None:
    """Keep the prepared data that `prepare` has just written, unless they are kept."""
    result = kept_data(context)
    if not kept.holds(result):
        kept.keep(context, result)
    context.changed("prepare")


def put_back_prepared(context: Context, *, folder: Path | None = None, download: bool = False) -> bool:
    """Put kept data back where there are none, or such of other settings, and return whether that was done.

    Data whose source cannot be read now, because another command named it, are put back whatever code made them.
    """
    result, any_code = kept_data(context), not can_be_read(context, folder=folder, download=download)
    summary = read_summary(context.paths.prepared) if context.paths.is_prepared else None
    if summary is not None and summary.get("settings") == deciding_values(context.recipe.dataset):
        kept.say_if_older(context, result, any_code=any_code)
        return False
    return kept.put_back(context, result, any_code=any_code)


def is_of_other_code(context: Context, *, folder: Path | None, download: bool) -> bool:
    """Tell whether other code made the prepared data, and this code can make them again."""
    return kept.is_of_other_code(kept_data(context)) and can_be_read(context, folder=folder, download=download)


def can_be_read(context: Context, *, folder: Path | None = None, download: bool = False) -> bool:
    """Tell whether the images are there of which the prepared data are, or those that are kept; see `prepare`."""
    from pipeline.data.sources import check_source

    if folder is not None or download:
        return True
    summary, result = read_summary(context.paths.prepared), kept_data(context)
    if summary is None and (second := kept.find(result, any_code=True)) is not None:
        file = kept.folder_of(result, second) / context.paths.prepared.name / "summary.json"
        with contextlib.suppress(PipelineError):
            summary = dict(read_json(file))
    if summary is not None and summary.get("folder") is not None and not context.recipe.dataset.path:
        return False  # `--from` has to name it
    try:
        check_source(context.recipe, context.paths.raw)
    except (UsageError, DataError):
        return False
    return True


def find_place(recipe: Recipe, folder: Path | None, *, download: bool) -> Path | None:
    """Return the folder or CSV file to read, None for the source's own files; refuse it beside a download."""
    path = recipe.dataset.path
    if download and (folder is not None or path):
        given = f"recipes.{recipe.name}.dataset.path: {path!r}" if folder is None else f"--from {printable(folder)}"
        raise UsageError(f"{given} and --download: both say where images come from; give one of them")
    return folder if folder is not None else Path(path) if path else None


def list_place(recipe: Recipe, place: Path, raw: Path, *, is_named: bool) -> Listing:
    """List a folder or CSV file, which --from names or else the recipe's `path`."""
    from pipeline.data.listing import list_source
    from pipeline.data.sources import check_folder, check_source

    if is_named:
        check_folder(recipe, raw, place)
    else:
        check_source(recipe, raw)
    return list_source(place)


def read_summary(prepared: Path) -> dict[str, Any] | None:
    """Read summary.json; None where there is none that is whole."""
    file = prepared / "summary.json"
    with contextlib.suppress(DataError):
        summary = read_json(file) if file.is_file() else None
        return summary if isinstance(summary, dict) else None
    return None


def damage_of(paths: Paths, summary: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the data set; None if it is whole. All of it is read, since only that finds damage."""
    from pipeline.data.datasets import Dataset
    from pipeline.data.encoded import EncodedImages
    from pipeline.system.runtime import resident_limit

    try:
        dataset = Dataset.load(paths.dataset, resident_limit())
        for split in dataset.splits.values():
            if isinstance(split.images, EncodedImages):
                split.images.verify()
    except DataError:
        return "damaged"
    return None if dataset.sha256 == summary.get("sha256") else "not what its summary says"


def digest_files(listing: Listing, memory: Path | None) -> tuple[str, dict[str, Seen]]:
    """Return the SHA-256 of a folder's images, reading only what is new since `memory` was written, and what it has."""
    from pipeline.data.digests import digest_listing

    return digest_listing(listing, {} if memory is None else _recall(memory, listing))


def remember_files(listing: Listing, seen: Mapping[str, Seen], memory: Path) -> None:
    """Write sizes, times and SHA-256 of a folder's files, unless they are there."""
    if seen != _recall(memory, listing):
        root = os.fspath(listing.root.resolve())
        content = canonical_json({"root": root, "files": dict(seen)}).encode()
        with lock(lock_of(memory), attempts=LOCK_ATTEMPTS):
            remove_leftovers(memory)
            write_atomic(memory, content)


def _recall(memory: Path, listing: Listing) -> dict[str, Seen]:
    """Read sizes, times and SHA-256 of a folder's files; none if they are damaged or of another folder."""
    root = os.fspath(listing.root.resolve())
    with contextlib.suppress(PipelineError, AttributeError, TypeError, ValueError):
        content = read_json(memory)
        if content["root"] == root:
            files = {name: (int(size), int(time), str(sha)) for name, (size, time, sha) in content["files"].items()}
            return {name: seen for name, seen in files.items() if is_sha256(seen[2])}
    return {}


def lock_of(out: Path) -> Path:
    """Return the lock of prepared data, or of what is remembered of their files."""
    return out.with_name(f"{out.name}.lock")


def part_of(out: Path) -> Path:
    """Return the folder in which the files of an encoded store are collected."""
    return out.with_name(f"{out.name}.part")


def not_used(left_out: list[dict[str, Any]]) -> str:
    """Say what of a folder is not used."""
    return "not used: " + "; ".join(named_count(entry["kind"], entry) for entry in left_out)


def named_count(what: str, entry: Mapping[str, Any]) -> str:
    """Return a number of things with the names of the first, as `2 other folders (a, b)`."""
    names, count = entry["names"], entry["count"]
    shown = ", ".join([*names, *(["..."] if count > len(names) else [])])
    return f"{count} {what}{'' if count == 1 else 's'} ({shown})"
