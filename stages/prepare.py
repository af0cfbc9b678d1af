"""`pipeline prepare`: from raw files to one data set, of uint8 images or of the files themselves, and its summary."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.config.recipes import ENCODED, Recipe, deciding_values
from pipeline.errors import DataError, UsageError, printable
from pipeline.system.storage import lock, remove_leftovers, write_json
from pipeline.system.text import counted
from stages.shared import kept, prepared
from stages.shared.dvc_file import code_digest
from stages.shared.options import PATH, dry_run_option, open_context, recipe_option

if TYPE_CHECKING:
    from pipeline.data.datasets import Dataset
    from pipeline.data.folders import Findings
    from pipeline.data.listing import Listing
    from stages.shared.context import Context


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
        any_code = not prepared.can_be_read(context, folder=folder, download=download)
        second = None if fresh or paths.is_prepared else kept.find(prepared.kept_data(context), any_code=any_code)
        if second is not None:
            context.say(f"{paths.dataset}: put back what was finished on {second.when}")
            return
        for line in prepared.plan_prepare(
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
    code_digest("prepare")  # now, since the files may be edited while images are read; it stays for this process
    if not fresh:
        prepared.put_back_prepared(context, folder=folder, download=download)
        state = prepared.check_prepared(context.recipe, paths, folder=folder, download=download)
        if state.is_done and not prepared.is_of_other_code(context, folder=folder, download=download):
            context.say(f"{paths.dataset}: {state.text}")
            kept.keep_if_first(context, prepared.kept_data(context))
            return
    former = prepared.read_summary(paths.prepared)
    summary = prepare(
        context.recipe,
        out=paths.prepared,
        raw=paths.raw,
        folder=folder,
        download=download,
        skip_bad=skip_bad,
        memory=paths.prepare_memory,
        context=context,
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
    paths, former = context.paths, prepared.read_summary(context.paths.prepared)
    settings = deciding_values(context.recipe.dataset)
    if paths.is_prepared and former is not None and former.get("settings") == settings:
        if former.get("sha256") == dataset.sha256 and prepared.damage_of(paths, former) is None:
            context.say(f"{paths.dataset}: up to date, of the same settings and images")
            return
    summary = _summarize(context.recipe, dataset, Findings())
    with lock(prepared.lock_of(paths.prepared)):
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
    prepared.keep_prepared(context)


def prepare(
    recipe: Recipe,
    *,
    out: Path,
    raw: Path,
    folder: Path | None = None,
    download: bool = False,
    skip_bad: bool = False,
    memory: Path | None = None,
    context: Context | None = None,
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
        context: Where it is shown how many files have been read; None shows nothing.

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
    from pipeline.data.sources import check_listing, read_source
    from pipeline.system.runtime import resident_limit

    place = prepared.find_place(recipe, folder, download=download)
    listing = None if place is None else prepared.list_place(recipe, place, raw, is_named=folder is not None)
    settings, part, collector = recipe.dataset, prepared.part_of(out), None
    with contextlib.ExitStack() as held:
        if listing is not None:  # before the work, which may take hours
            check_listing(recipe, listing, skip_bad=skip_bad)
            held.enter_context(lock(prepared.lock_of(out)))
        if settings.store == ENCODED and listing is not None:
            if (shown := _shown_anew(recipe, out, listing, memory, skip_bad=skip_bad)) is not None:
                return shown
            size, resize = settings.image_size, settings.resize
            collector = Collector(part, image_size=size, resize=resize, max_side=settings.max_side)
            held.enter_context(collector)
        digest, seen = (
            (None, {}) if listing is None or collector is not None else prepared.digest_files(listing, memory)
        )
        dataset, findings = read_source(
            recipe,
            raw=raw,
            folder=listing,
            download=download,
            skip_bad=skip_bad,
            spill=Spill(out, resident_limit()),
            collector=collector,
            advance=_advancing(held, context, listing),
        )
        if listing is not None and collector is not None:  # it has read every file already
            digest, seen = digest_listing(listing, collector.seen, collected=True)
        summary = _summarize(recipe, dataset, findings)
        if place is not None:
            summary |= {"folder": printable(place.resolve().name), "source_sha256": digest, "reader": prepared.READER}
        if listing is None:
            held.enter_context(lock(prepared.lock_of(out)))
        _write(out, dataset, summary, may_move=collector is not None)
    if listing is not None and memory is not None:
        prepared.remember_files(listing, seen, memory)
    return summary


def _advancing(held: contextlib.ExitStack, context: Context | None, listing: Listing | None) -> Callable[[], object]:
    """Return what counts a file that was read, and shows it until `held` ends."""
    if context is None or listing is None:
        return lambda: None
    from pipeline.report.progress import CountWatcher

    total = sum(listing.counts.values())
    return held.enter_context(
        CountWatcher(context.console, context.say, "reading files", "read", "files", total)
    ).advance


def _shown_anew(
    recipe: Recipe, out: Path, listing: Listing, memory: Path | None, *, skip_bad: bool
) -> dict[str, Any] | None:
    """Write what is prepared of the same files under another `image_size` or `resize`, and decode nothing.

    Returns:
        Its summary; None where something else has changed, or is damaged.
    """
    from pipeline.data.datasets import Dataset
    from pipeline.data.decoding import TOO_NARROW
    from pipeline.data.encoded import EncodedImages
    from pipeline.data.file import FILE

    summary, settings, shown = prepared.read_summary(out), deciding_values(recipe.dataset), recipe.dataset
    former = None if summary is None else summary.get("settings")
    if summary is None or not isinstance(former, dict) or summary.get("reader") != prepared.READER:
        return None
    changed = {key for key in {*settings, *former} if settings.get(key) != former.get(key)}
    if not changed or changed - {"image_size", "resize"} or (summary.get("num_skipped") != 0 and not skip_bad):
        return None
    if any(TOO_NARROW in file["reason"] for file in summary["skipped"]):
        return None  # it may fit now, and is not in the store
    digest, seen = prepared.digest_files(listing, memory)
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
        prepared.remember_files(listing, seen, memory)
    return summary


def _write(out: Path, dataset: Dataset, summary: Mapping[str, Any], *, may_move: bool = False) -> None:
    """Write the files of a data set, for a caller that holds their lock; those collected for it may be moved."""
    from pipeline.data.file import FILE

    remove_leftovers(out)
    dataset.save(out / FILE, may_move=may_move)
    write_json(out / "summary.json", summary)
    shutil.rmtree(prepared.part_of(out), ignore_errors=True)


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Return what a user should know of prepared data, one line each: decisions, what is not used, copies.

    Args:
        summary: The content of summary.json, as `prepare` returns it.
    """
    lines = list(summary["notes"])
    if summary["left_out"]:
        lines.append(prepared.not_used(summary["left_out"]))
    if alpha := summary["unused_alpha"]:
        lines.append(f"alpha is 0 everywhere, and ignored, in {prepared.named_count('image', alpha)}")
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


def _changes(former: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """Say that the data set is another one than before."""
    before = former.get("sha256")
    if before == summary["sha256"]:
        return []
    line = f"another data set than before, whose SHA-256 was {before}: what was trained on that one no longer fits"
    if (former.get("folder") is None) != (summary.get("folder") is None):
        line += "; a folder and a download of the same images are two data sets, since their order differs"
    return [line]


def _summarize(recipe: Recipe, dataset: Dataset, findings: Findings) -> dict[str, Any]:
    """Return what summary.json says of a data set.

    `settings` are the recipe's, by which a later change is noticed; `class_counts` are by split, in the order of
    `class_names`; `evaluation` is the split that models are compared on, `val` or `test`; `mean` and `std` are of each
    channel over train, pixels in [0, 1]; `skipped` are the bad files left out, each with its reason; `left_out` is what
    of a folder is not used, `unused_alpha` the images whose alpha is ignored; `copies` see pipeline.data.copies.

    Of a folder or CSV file `prepare` adds its name, the SHA-256 of its images, and the READER.
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
