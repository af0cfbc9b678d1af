"""`pipeline prepare`: from raw files to one data set, of uint8 images or of the files themselves, and its summary."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.config.recipes import ENCODED, Recipe, deciding_values
from pipeline.errors import DataError, PipelineError, UsageError, printable
from pipeline.system.canonical import canonical_json, fingerprint, is_sha256
from pipeline.system.storage import lock, read_json, remove_leftovers, write_atomic, write_json
from pipeline.system.text import counted
from stages.shared import kept
from stages.shared.options import PATH, dry_run_option, open_context, recipe_option
from stages.shared.paths import Paths
from stages.shared.runs import State, differences

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset
    from pipeline.data.digests import Seen
    from pipeline.data.folders import Findings
    from pipeline.data.listing import Listing
    from stages.shared.context import Context

# Raised where the same folder gives other images, splits or classes: what was prepared before is then made again.
READER = 2


@click.command("prepare")
@recipe_option
@click.option("--download", is_flag=True, help="Download what is missing to data/raw.")
@click.option("--from", "folder", type=PATH, help="Take the images from this folder, or from a CSV file's list.")
@click.option("--skip-bad", is_flag=True, help="Leave corrupt, empty and oversized files out.")
@click.option("--fresh", is_flag=True, help="Prepare again even if nothing has changed.")
@dry_run_option
def command(
    recipe: str | None, download: bool, folder: Path | None, skip_bad: bool, fresh: bool, dry_run: bool
) -> None:
    """Turn images into a data set that the other commands read, unless that is up to date."""
    context = open_context(recipe)
    paths = context.paths
    if "DVC_STAGE" in os.environ:  # before the stages that DVC makes of the lists: the last may fail after days
        context.params.require_lists(context.recipe)
    if dry_run:
        any_code = not _can_be_read(context, folder=folder, download=download)
        second = None if fresh or paths.is_prepared else kept.find(kept_data(context), any_code=any_code)
        if second is not None:
            context.say(f"{paths.dataset}: put back what was finished on {second.when}")
            return
        for line in plan_prepare(
            context.recipe, paths, folder=folder, download=download, skip_bad=skip_bad, fresh=fresh
        ):
            context.say(line)
        return
    prepare_unless_done(context, folder=folder, download=download, skip_bad=skip_bad, fresh=fresh)
    context.end()


def prepare_unless_done(
    context: Context,
    *,
    folder: Path | None = None,
    download: bool = False,
    skip_bad: bool = False,
    fresh: bool = False,
) -> None:
    """Prepare a recipe's data unless they are up to date, and say what was done.

    Args:
        context: The command's setting.
        folder: See `prepare`.
        download: See `prepare`.
        skip_bad: See `prepare`.
        fresh: Whether to prepare again even if nothing has changed.

    Raises:
        UsageError: See `prepare`.
        DataError: See `prepare`.
        StorageError: See `prepare`.
    """
    paths = context.paths
    if not fresh:
        put_back_prepared(context, folder=folder, download=download)
        state = check_prepared(context.recipe, paths, folder=folder, download=download)
        if state.is_done and not _is_of_other_code(context, folder=folder, download=download):
            context.say(f"{paths.dataset}: {state.text}")
            kept.keep_if_first(context, kept_data(context))
            return
    former = _read_summary(paths.prepared)
    summary = prepare(
        context.recipe,
        out=paths.prepared,
        raw=paths.raw,
        folder=folder,
        download=download,
        skip_bad=skip_bad,
        memory=paths.prepare_memory,
    )
    _tell_prepared(context, former, summary)


def take_dataset(context: Context, dataset: Dataset) -> None:
    """Take a data set that is in memory as a recipe's prepared data, unless it is what is there.

    Args:
        context: The setting; its recipe's `dataset` has the data set's source and image size.
        dataset: The data set.

    Raises:
        UsageError: It has pixels, and the recipe asks for files.
        StorageError: It cannot be written.
    """
    from pipeline.data.encoded import EncodedImages
    from pipeline.data.folders import Findings

    if context.recipe.dataset.store == ENCODED and not isinstance(dataset.train.images, EncodedImages):
        raise UsageError(
            f"recipes.{context.recipe.name}.dataset.store: {ENCODED} keeps image files, and these are arrays; give a "
            "folder, or take another recipe"
        )
    paths, former = context.paths, _read_summary(context.paths.prepared)
    settings = deciding_values(context.recipe.dataset)
    if paths.is_prepared and former is not None and former.get("settings") == settings:
        if former.get("sha256") == dataset.sha256 and _damage(paths, former) is None:
            context.say(f"{paths.dataset}: up to date, of the same settings and images")
            return
    summary = _summarize(context.recipe, dataset, Findings())
    with lock(_lock(paths.prepared)):
        _write(paths.prepared, dataset, summary)
    _tell_prepared(context, former, summary)


def _tell_prepared(context: Context, former: Mapping[str, Any] | None, summary: Mapping[str, Any]) -> None:
    """Say what was prepared in place of what, and keep it."""
    paths = context.paths
    counts = ", ".join(f"{count} {split}" for split, count in summary["num_samples"].items())
    num_classes = len(summary["class_names"])
    context.say(f"{paths.dataset}: {counts} images of {counted(num_classes, 'class')}, SHA-256 {summary['sha256']}")
    if summary["skipped"]:
        context.say(f"skipped {counted(summary['num_skipped'], 'bad file')}; see {paths.prepared / 'summary.json'}")
    for line in [*remarks(summary), *([] if former is None else _changes(former, summary))]:
        context.say(line)
    keep_prepared(context)


def prepare(
    recipe: Recipe,
    *,
    out: Path,
    raw: Path,
    folder: Path | None = None,
    download: bool = False,
    skip_bad: bool = False,
    memory: Path | None = None,
) -> dict[str, Any]:
    """Read a recipe's data set, cut its splits, and write `dataset.json`, what belongs beside it, and `summary.json`.

    A folder's images that are too many for RAM go through an unnamed file in `out`. The files of an encoded store are
    collected beside `out`, where a run that was stopped or refused goes on.

    Args:
        recipe: The recipe.
        out: Folder for the files, made if missing; earlier ones there are replaced once all images are read.
        raw: Folder of torchvision's downloads.
        folder: An image folder or CSV file to read in place of the recipe's `path` or the source's own files.
        download: Download to `raw` what is missing there.
        skip_bad: Leave an image folder's bad files out instead of refusing it.
        memory: Remembers the SHA-256 of a folder's files, so that they are not read again to see whether they changed.

    Returns:
        The content of summary.json, see `_summarize`.

    Raises:
        UsageError: Both a folder and a download are given; or the source is `folder` and no existing folder is given.
        DataError: The files are missing, damaged, no data set, or not the source that the recipe names.
        StorageError: Downloading, reading or writing failed.
    """
    from pipeline.data.arrays import Spill
    from pipeline.data.collecting import Collector
    from pipeline.data.digests import digest_listing
    from pipeline.data.sources import read_source
    from pipeline.system.runtime import resident_limit

    place = _place(recipe, folder, download=download)
    listing = None if place is None else _list(recipe, place, raw, is_named=folder is not None)
    settings, part, collector = recipe.dataset, _part(out), None
    with contextlib.ExitStack() as held:
        if settings.store == ENCODED and listing is not None:
            held.enter_context(lock(_lock(out)))
            if (shown := _shown_anew(recipe, out, listing, memory, skip_bad=skip_bad)) is not None:
                return shown
            size, resize = settings.image_size, settings.resize
            collector = Collector(part, image_size=size, resize=resize, max_side=settings.max_side)
            held.enter_context(collector)
        digest, seen = (None, {}) if listing is None or collector is not None else _digest(listing, memory)
        dataset, findings = read_source(
            recipe,
            raw=raw,
            folder=listing,
            download=download,
            skip_bad=skip_bad,
            spill=Spill(out, resident_limit()),
            collector=collector,
        )
        if listing is not None and collector is not None:  # it has read every file already
            digest, seen = digest_listing(listing, collector.seen)
        summary = _summarize(recipe, dataset, findings)
        if place is not None:
            summary |= {"folder": printable(place.resolve().name), "source_sha256": digest, "reader": READER}
        if collector is None:
            held.enter_context(lock(_lock(out)))
        _write(out, dataset, summary)
    if listing is not None and memory is not None:
        _remember(listing, seen, memory)
    return summary


def _shown_anew(
    recipe: Recipe, out: Path, listing: Listing, memory: Path | None, *, skip_bad: bool
) -> dict[str, Any] | None:
    """Write what is prepared of the same files under another `image_size` or `resize`, and decode nothing.

    Returns:
        Its summary; None where something else has changed, or is damaged.
    """
    from pipeline.data.datasets import Dataset
    from pipeline.data.encoded import EncodedImages
    from pipeline.data.file import FILE

    summary, settings, shown = _read_summary(out), deciding_values(recipe.dataset), recipe.dataset
    former = None if summary is None else summary.get("settings")
    if summary is None or not isinstance(former, dict) or summary.get("reader") != READER:
        return None
    changed = {key for key in {*settings, *former} if settings.get(key) != former.get(key)}
    if not changed or changed - {"image_size", "resize"} or (summary.get("num_skipped") != 0 and not skip_bad):
        return None
    digest, seen = _digest(listing, memory)
    try:
        dataset = Dataset.load(out / FILE).shown(shown.image_size, shown.resize)
    except DataError:
        return None
    every = [split.images for split in dataset.splits.values() if isinstance(split.images, EncodedImages)]
    if digest != summary.get("source_sha256") or any(len(images.too_narrow()) for images in every):
        return None
    summary |= {"recipe": recipe.name, "settings": settings}
    _write(out, dataset, summary)
    if memory is not None:
        _remember(listing, seen, memory)
    return summary


def _write(out: Path, dataset: Dataset, summary: Mapping[str, Any]) -> None:
    """Write the files of a data set, for a caller that holds their lock."""
    from pipeline.data.file import FILE

    remove_leftovers(out)
    dataset.save(out / FILE)
    write_json(out / "summary.json", summary)
    shutil.rmtree(_part(out), ignore_errors=True)


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

    place = _place(recipe, folder, download=download)
    summary = _read_summary(paths.prepared) if paths.is_prepared else None
    if summary is None:
        is_former = paths.dataset.with_name(FORMER_FILE).exists()
        return State("in place of one of a former layout" if is_former else "no data yet")
    if changed := differences({"settings": summary.get("settings")}, {"settings": deciding_values(recipe.dataset)}):
        return State(f"in place of one of other settings: {', '.join(changed)}")
    if (damage := _damage(paths, summary)) is not None:
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
    digest, seen = _digest(listing, paths.prepare_memory)
    if remember:
        _remember(listing, seen, paths.prepare_memory)
    is_same = digest == summary.get("source_sha256")
    if is_same and summary.get("reader") == READER:
        left_out = f"; {_not_used(listing.left_out.as_json())}" if listing.left_out.names else ""
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
    from pipeline.data.sources import check_known, check_source

    state = check_prepared(recipe, paths, folder=folder, download=download, remember=False)
    if state.is_done and not fresh:
        return [f"{paths.dataset}: {state.text}"]
    place, source, lines = _place(recipe, folder, download=download), recipe.dataset.source, []
    if place is not None:
        listing = _list(recipe, place, paths.raw, is_named=folder is not None)
        lines = [*check_known(source, listing.class_names, listing.counts), *listing.notes]
        if listing.left_out.names:
            lines.append(_not_used(listing.left_out.as_json()))
        counts = ", ".join(f"{count} {split}" for split, count in listing.counts.items())
        num_classes = counted(len(listing.class_names), "class")
        what = f"{counts} images of {num_classes} in {printable(place)}, which are not opened yet"
        if listing.bad:
            what += f"; {counted(len(listing.bad), 'other file')}, " + (
                "left out" if skip_bad else "for which it is refused"
            )
    elif download and source not in ("digits", "folder"):
        what = f"{source} in {paths.raw}, downloading what is missing"
    else:
        check_source(recipe, paths.raw)
        what = "the bundled digits" if source == "digits" else f"{source} in {paths.raw}"
    return [f"read {what}", *lines, f"write {paths.dataset} ({state.text})"]


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Return what a user should know of prepared data, one line each: decisions, what is not used, copies.

    Args:
        summary: The content of summary.json, as `prepare` returns it.
    """
    lines = list(summary["notes"])
    if summary["left_out"]:
        lines.append(_not_used(summary["left_out"]))
    if alpha := summary["unused_alpha"]:
        lines.append(f"alpha is 0 everywhere, and ignored, in {_counted('image', alpha)}")
    copies, examples = summary["copies"], summary["copies"]["examples"]

    def as_in(kind: str) -> str:
        return f", as {' and '.join(examples[kind])}" if kind in examples else ""

    for split, count in copies["in_train"].items():
        if count:
            total, are = summary["num_samples"][split], "is a copy" if count == 1 else "are copies"
            lines.append(
                f"warning: {count} of {total} {split} images {are} of training images"
                f"{as_in(split)}: scores on them are too high"
            )
    if count := copies["in_two_classes"]:
        what = "1 image is" if count == 1 else f"{count} images are"
        lines.append(f"warning: {what} under two classes{as_in('in_two_classes')}")
    if count := copies["repeated"]:
        what = "1 image is a copy" if count == 1 else f"{count} images are copies"
        lines.append(f"warning: {what} of another in the same split{as_in('repeated')}")
    return lines


def _not_used(left_out: list[dict[str, Any]]) -> str:
    return "not used: " + "; ".join(_counted(entry["kind"], entry) for entry in left_out)


def _counted(what: str, entry: Mapping[str, Any]) -> str:
    """Return a number of things with the names of the first, as `2 other folders (a, b)`."""
    names, count = entry["names"], entry["count"]
    shown = ", ".join([*names, *(["..."] if count > len(names) else [])])
    return f"{count} {what}{'' if count == 1 else 's'} ({shown})"


def _changes(former: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """Say that the data set is another one than before."""
    before = former.get("sha256")
    if before == summary["sha256"]:
        return []
    line = f"another data set than before, whose SHA-256 was {before}: what was trained on that one no longer fits"
    if (former.get("folder") is None) != (summary.get("folder") is None):
        line += "; a folder and a download of the same images are two data sets, since their order differs"
    return [line]


def _place(recipe: Recipe, folder: Path | None, *, download: bool) -> Path | None:
    """Return the folder or CSV file to read, None for the source's own files; refuse it beside a download."""
    path = recipe.dataset.path
    if download and (folder is not None or path):
        given = f"recipes.{recipe.name}.dataset.path: {path!r}" if folder is None else f"--from {printable(folder)}"
        raise UsageError(f"{given} and --download: both say where images come from; give one of them")
    return folder if folder is not None else Path(path) if path else None


def _list(recipe: Recipe, place: Path, raw: Path, *, is_named: bool) -> Listing:
    """List a folder or CSV file, which --from names or else the recipe's `path`."""
    from pipeline.data.listing import list_source
    from pipeline.data.sources import check_source

    if not is_named:
        check_source(recipe, raw)
    return list_source(place)


def _read_summary(prepared: Path) -> dict[str, Any] | None:
    """Read summary.json; None where there is none that is whole."""
    file = prepared / "summary.json"
    with contextlib.suppress(DataError):
        summary = read_json(file) if file.is_file() else None
        return summary if isinstance(summary, dict) else None
    return None


def _damage(paths: Paths, summary: Mapping[str, Any]) -> str | None:
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


def _digest(listing: Listing, memory: Path | None) -> tuple[str, dict[str, Seen]]:
    """Return the SHA-256 of a folder's images, reading only what is new since `memory` was written, and what it has."""
    from pipeline.data.digests import digest_listing

    return digest_listing(listing, {} if memory is None else _recall(memory, listing))


def _remember(listing: Listing, seen: Mapping[str, Seen], memory: Path) -> None:
    """Write sizes, times and SHA-256 of a folder's files, unless they are there."""
    if seen != _recall(memory, listing):
        remove_leftovers(memory)
        root = os.fspath(listing.root.resolve())
        write_atomic(memory, canonical_json({"root": root, "files": dict(seen)}).encode())


def _recall(memory: Path, listing: Listing) -> dict[str, Seen]:
    """Read sizes, times and SHA-256 of a folder's files; none if they are damaged or of another folder."""
    root = os.fspath(listing.root.resolve())
    with contextlib.suppress(PipelineError, AttributeError, TypeError, ValueError):
        content = read_json(memory)
        if content["root"] == root:
            files = {name: (int(size), int(time), str(sha)) for name, (size, time, sha) in content["files"].items()}
            return {name: seen for name, seen in files.items() if is_sha256(seen[2])}
    return {}


def _summarize(recipe: Recipe, dataset: Dataset, findings: Findings) -> dict[str, Any]:
    """Return what summary.json says of a data set.

    `settings` are the recipe's, by which a later change is noticed; `class_counts` are by split, in the order of
    `class_names`; `evaluation` is the split that models are compared on, `val` or `test`; `mean` and `std` are of each
    channel over train, pixels in [0, 1]; `skipped` are the bad files left out, each with its reason; `left_out` is what
    of a folder is not used, `unused_alpha` the images whose alpha is ignored; `copies` see pipeline.data.copies.

    Of a folder or CSV file `prepare` adds its name, the SHA-256 of its images, and READER.
    """
    import numpy as np

    from pipeline.data.copies import find_copies
    from pipeline.data.listing import NUM_NAMED

    splits, num_classes = dataset.splits.items(), dataset.num_classes
    alpha = findings.unused_alpha
    return {
        "recipe": recipe.name,
        "source": dataset.source,
        "settings": deciding_values(recipe.dataset),
        "num_samples": {name: len(split) for name, split in splits},
        "class_counts": {name: np.bincount(split.labels, minlength=num_classes).tolist() for name, split in splits},
        "class_names": list(dataset.class_names),
        "evaluation": dataset.evaluation[0],
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "sha256": dataset.sha256,
        "num_skipped": len(findings.bad),
        "skipped": [dataclasses.asdict(file) for file in findings.bad],
        "left_out": findings.left_out.as_json(),
        "unused_alpha": {"count": len(alpha), "names": alpha[:NUM_NAMED]} if alpha else None,
        "notes": findings.notes,
        "copies": find_copies(dataset).as_json(),
    }


def kept_data(context: Context) -> kept.Result:
    """Describe a recipe's prepared data as they are kept: its settings and the layout decide whether they fit."""
    from pipeline.data.file import NAMES, SCHEMA

    out, settings = context.paths.prepared, deciding_values(context.recipe.dataset)
    decides = fingerprint({"settings": settings, "schema": SCHEMA})
    files = (*(out / name for name in NAMES if (out / name).is_file()), out / "summary.json")
    return kept.Result(context.recipe.name, "prepare", decides, out, files, lock=_lock(out), project=context.project)


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
    result, any_code = kept_data(context), not _can_be_read(context, folder=folder, download=download)
    summary = _read_summary(context.paths.prepared) if context.paths.is_prepared else None
    if summary is not None and summary.get("settings") == deciding_values(context.recipe.dataset):
        kept.say_if_older(context, result, any_code=any_code)
        return False
    return kept.put_back(context, result, any_code=any_code)


def _is_of_other_code(context: Context, *, folder: Path | None, download: bool) -> bool:
    """Tell whether other code made the prepared data, and this code can make them again."""
    return kept.is_of_other_code(kept_data(context)) and _can_be_read(context, folder=folder, download=download)


def _can_be_read(context: Context, *, folder: Path | None = None, download: bool = False) -> bool:
    """Tell whether the images are there of which the prepared data are, or those that are kept; see `prepare`."""
    from pipeline.data.sources import check_source

    if folder is not None or download:
        return True
    summary, result = _read_summary(context.paths.prepared), kept_data(context)
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


def check_available(context: Context) -> str | None:
    """Say which kept data `prepare` would put back; None where it would read the recipe's own source.

    Raises:
        UsageError: The source is `folder`, and nothing is kept.
        DataError: The source's files are missing, and nothing is kept.
    """
    from pipeline.data.sources import check_source

    second = kept.find(kept_data(context), any_code=not _can_be_read(context))
    if second is None:
        check_source(context.recipe, context.paths.raw)
        return None
    return f"put back what was finished on {second.when}"


def _lock(out: Path) -> Path:
    return out.with_name(f"{out.name}.lock")


def _part(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")
