"""Sources: digits against fixed digests, torchvision's sets from fabricated and real files, failing downloads."""

from __future__ import annotations

import gc
import gzip
import hashlib
import http.server
import os
import pickle
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torchvision.datasets
from PIL import Image

from pipeline.config.recipes import DatasetRecipe, LabelRecipe, Recipe, SelectRecipe
from pipeline.data import sources
from pipeline.data.listing import list_source
from pipeline.data.sources import KNOWN_CLASSES, KNOWN_SIZES, check_folder, check_known, load_digits, read_source
from pipeline.errors import DataError, StorageError, UsageError

DIGITS_SHA256 = "67f9bfeb5259416f071d9d2623d1ef6b9b4ca13bf19ef4afa285c9c7bb03c7d5"


def make_recipe(source, name="own", **settings):
    dataset = DatasetRecipe(source=source, **settings)
    return Recipe(
        name=name, dataset=dataset, views={}, teachers={}, select=SelectRecipe(), label=LabelRecipe(), students={}
    )


# --- digits ------------------------------------------------------------------------------------------------


def test_digits_are_the_same_data_set_for_everybody(tmp_path):
    dataset, findings = read_source(make_recipe("digits"), raw=tmp_path)
    assert dataset.sha256 == DIGITS_SHA256 and findings.bad == []
    assert (len(dataset.train), len(dataset.test), dataset.val) == (1437, 360, None)
    assert dataset.source == "digits" and dataset.class_names == tuple("0123456789")
    assert dataset.train.images.shape == (1437, 32, 32, 3)
    assert np.bincount(dataset.test.labels).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    assert list(tmp_path.iterdir()) == []


def test_the_bundled_digits_are_scikit_learns():
    levels, labels = load_digits()
    theirs = sklearn.datasets.load_digits()
    assert np.array_equal(levels, theirs.images) and np.array_equal(labels, theirs.target)
    assert levels.dtype == np.float64 and labels.dtype == np.int64
    file = Path(sources.__file__).with_name("digits.csv.gz")
    assert hashlib.sha256(file.read_bytes()).hexdigest() in file.with_name("digits.txt").read_text()


def test_digits_of_their_own_size_are_grey_levels_scaled_to_255(tmp_path):
    dataset, _ = read_source(make_recipe("digits", image_size=8), raw=tmp_path)
    levels, labels = load_digits()
    images = {image.tobytes(): label for image, label in zip(dataset.test.images, dataset.test.labels, strict=True)}
    scaled = np.stack([np.round(levels * 255 / 16).astype(np.uint8)] * 3, axis=-1)
    tested = [index for index, image in enumerate(scaled) if image.tobytes() in images]
    assert len(tested) == 360
    assert [images[scaled[index].tobytes()] for index in tested] == labels[tested].tolist()


def test_the_validation_split_leaves_the_test_split_as_it_was(tmp_path):
    plain, _ = read_source(make_recipe("digits"), raw=tmp_path)
    cut, _ = read_source(make_recipe("digits", val_fraction=0.1), raw=tmp_path)
    assert (len(cut.train), len(cut.val), len(cut.test)) == (1293, 144, 360)
    assert np.array_equal(cut.test.images, plain.test.images)
    other, _ = read_source(make_recipe("digits", split_seed=1), raw=tmp_path)
    assert not np.array_equal(other.test.images, plain.test.images)


# --- image folders -----------------------------------------------------------------------------------------


def test_the_source_folder_needs_to_be_told_which(tmp_path):
    with pytest.raises(UsageError, match="`pipeline prepare --recipe flowers --from FOLDER`"):
        read_source(make_recipe("folder", name="flowers"), raw=tmp_path)


def test_a_folder_is_read_with_the_paths_of_its_images(tmp_path):
    for number in range(20):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (7, 5), number).save(path)
    (tmp_path / "train" / "a" / "03.png").write_bytes(b"")
    recipe = make_recipe("folder", image_size=6, test_fraction=0.3)
    with pytest.raises(DataError, match=r"03\.png"):
        read_source(recipe, raw=tmp_path, folder=list_source(tmp_path))
    dataset, findings = read_source(recipe, raw=tmp_path, folder=list_source(tmp_path), skip_bad=True)
    assert dataset.source == "folder" and dataset.class_names == ("a", "b")
    assert dataset.image_size == 6 and (len(dataset.train), len(dataset.test)) == (14, 6)
    assert [file.path for file in findings.bad] == ["train/a/03.png"]
    for split in dataset.splits.values():
        for pixels, label, name in zip(split.images, split.labels, split.names, strict=True):
            assert name == f"train/{'ab'[label]}/{pixels[0, 0, 0]:02}.png"


def test_a_validation_folder_is_the_validation_split(tmp_path):
    for split, number in (("train", 6), ("Valid", 2), ("TEST", 3)):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(number):
                Image.new("L", (4, 4), index).save(tmp_path / split / label / f"{index}.png")
    for fraction, words in ((0.5, ["the folder has a validation split: val_fraction 0.5 is not applied"]), (0.0, [])):
        recipe = make_recipe("folder", image_size=4, val_fraction=fraction)
        dataset, findings = read_source(recipe, raw=tmp_path, folder=list_source(tmp_path))
        assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 12, "val": 4, "test": 6}
        assert dataset.evaluation[0] == "val" and dataset.val.names[0] == "Valid/a/0.png"
        assert findings.notes == words
    shutil.rmtree(tmp_path / "TEST")
    dataset, _ = read_source(make_recipe("folder", image_size=4), raw=tmp_path, folder=list_source(tmp_path))
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 9, "val": 4, "test": 3}


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_counts_and_class_names_decide_whether_a_folder_is_a_known_source():
    everything = {"train": 50_000, "test": 10_000}
    assert check_known("folder", ["any"], {"train": 1}) == []
    assert check_known("cifar10", CIFAR10, everything) == []
    assert check_known("cifar10", CIFAR10, {"train": 45_000, "val": 5_000, "test": 10_000}) == []
    assert check_known("cifar100", KNOWN_CLASSES["cifar100"], everything) == []
    assert check_known("mnist", list("0123456789"), {"train": 60_000, "test": 10_000}) == []
    assert check_known("digits", list("0123456789"), {"train": 1797}) == []
    part = check_known("cifar10", CIFAR10, {"train": 12_500, "test": 10_000})
    assert part == ["a part of cifar10: 12500 of 50000 training images"]


@pytest.mark.parametrize(
    ("names", "counts", "words"),
    [
        ([*CIFAR10[:9], "lorry"], {"train": 50_000, "test": 10_000}, "10 classes, 'lorry' is none of them"),
        (CIFAR10[:9], {"train": 50_000, "test": 10_000}, "10 classes, the folder has 9"),
        ([*CIFAR10[:9], "Ship"], {"train": 50_000, "test": 10_000}, "10 classes, the folder has 9"),
        (
            CIFAR10,
            {"train": 50_001, "test": 10_000},
            "50000 training and 10000 test images, the folder 50001 and 10000",
        ),
        (CIFAR10, {"train": 50_000, "test": 9_999}, "the folder 50000 and 9999"),
        (CIFAR10, {"train": 60_000}, "the folder 60000 and 0"),
    ],
)
def test_a_folder_that_is_not_the_known_source_is_refused_with_a_way_out(names, counts, words):
    with pytest.raises(DataError, match=f"{words}; for images of your own take a recipe with .*source: folder"):
        check_known("cifar10", names, counts)


def test_every_known_source_has_the_names_of_its_classes():
    for source, names in KNOWN_CLASSES.items():
        assert len(set(names)) == KNOWN_SIZES[source][2] and list(names) == sorted(names)


# --- torchvision's sets ------------------------------------------------------------------------------------


def idx(array):
    """The format of MNIST's files: type and dimensions, big-endian, then the values."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Make a tiny MNIST, accept its digests as the real ones, and return its folder, images and labels."""
    folder = tmp_path / "raw" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    parts = {"train": slice(0, 20), "t10k": slice(20, 30)}
    contents = {}
    for name, part in parts.items():
        contents[f"{name}-images-idx3-ubyte"] = idx(images[part])
        contents[f"{name}-labels-idx1-ubyte"] = idx(labels[part])
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        monkeypatch.setitem(sources.MNIST_SHA256, name, hashlib.sha256(content).hexdigest())
    assert contents.keys() == sources.MNIST_SHA256.keys()
    return folder, images, labels


def test_mnist_is_resized_by_pillow_and_kept_in_its_order(mnist, tmp_path):
    _, images, labels = mnist
    dataset, _ = read_source(make_recipe("mnist"), raw=tmp_path / "raw")
    resized = [Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR) for image in images]
    expected = np.stack([np.stack([np.asarray(image)] * 3, axis=-1) for image in resized])
    assert np.array_equal(np.concatenate([dataset.train.images, dataset.test.images]), expected)
    assert np.array_equal(np.concatenate([dataset.train.labels, dataset.test.labels]), labels)
    assert dataset.class_names[3] == "3 - three"


def test_mnist_archives_put_there_by_hand_need_no_download(mnist, tmp_path):
    folder = mnist[0]
    expected, _ = read_source(make_recipe("mnist"), raw=tmp_path / "raw")
    for path in list(folder.iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    assert read_source(make_recipe("mnist"), raw=tmp_path / "raw")[0].sha256 == expected.sha256


@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b", gzip.compress(b"something else", mtime=0), gzip.compress(b"x" * 99, mtime=0)[:20]]
)
def test_an_mnist_archive_that_is_not_whole_is_not_unpacked(mnist, tmp_path, content):
    name = "train-labels-idx1-ubyte"
    (mnist[0] / name).unlink()
    (mnist[0] / f"{name}.gz").write_bytes(content)
    with pytest.raises(DataError, match="mnist: not found in .*raw, or damaged"):
        read_source(make_recipe("mnist"), raw=tmp_path / "raw")
    assert not (mnist[0] / name).exists()


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_damaged_mnist_file_is_named(mnist, tmp_path, keep, download):
    path = mnist[0] / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte: damaged.*delete it and run again with --download"):
        read_source(make_recipe("mnist"), raw=tmp_path / "raw", download=download)


class OldArray:
    """Pickles like the arrays of CIFAR's time: the flags of its dtype are integers."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        return np.ndarray, (self.array.shape, OldType(), self.array.tobytes())


class OldType:
    def __reduce__(self):
        return np.dtype, ("u1", 0, 1)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Make a tiny CIFAR-100, accept its digests as the real ones, and return its images and labels."""
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    labels = (np.arange(12) % 3).tolist()
    folder = tmp_path / "raw" / "cifar-100-python"
    folder.mkdir(parents=True)

    def write(name, entry):
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def flat(part):
        return OldArray(np.ascontiguousarray(images[part].transpose(0, 3, 1, 2)).reshape(-1, 3072))

    cifar100 = torchvision.datasets.CIFAR100
    train = write("train", {"data": flat(slice(0, 9)), "fine_labels": labels[:9]})
    test = write("test", {"data": flat(slice(9, 12)), "fine_labels": labels[9:]})
    meta = write("meta", {"fine_label_names": ["apple", "bear", "cup"]})
    monkeypatch.setattr(cifar100, "train_list", [["train", train]])
    monkeypatch.setattr(cifar100, "test_list", [["test", test]])
    monkeypatch.setattr(cifar100, "meta", {**cifar100.meta, "md5": meta})
    return images, labels


def test_cifar_is_read_as_it_is_and_without_a_warning(cifar, tmp_path):
    images, labels = cifar
    dataset, _ = read_source(make_recipe("cifar100"), raw=tmp_path / "raw")
    assert dataset.class_names == ("apple", "bear", "cup")
    assert np.array_equal(dataset.train.images, images[:9]) and np.array_equal(dataset.test.images, images[9:])
    assert dataset.train.labels.tolist() == labels[:9] and dataset.train.labels.dtype == np.int64


def test_a_cifar_archive_put_there_by_hand_needs_no_download(cifar, tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    archive = shutil.make_archive(str(raw / "cifar-100-python"), "gztar", raw, "cifar-100-python")
    digest = hashlib.md5(Path(archive).read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "tgz_md5", digest)
    shutil.rmtree(raw / "cifar-100-python")
    dataset, _ = read_source(make_recipe("cifar100"), raw=raw)
    assert np.array_equal(dataset.train.images, cifar[0][:9])


def test_a_cifar_pickle_is_not_opened_unless_its_checksum_is_right(cifar, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (tmp_path / "raw" / "cifar-100-python" / "train").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not found in .*, or damaged"):
        read_source(make_recipe("cifar100"), raw=tmp_path / "raw")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("source", ["mnist", "cifar10", "cifar100"])
def test_what_is_not_there_is_named_with_both_ways_to_get_it(tmp_path, source):
    with pytest.raises(DataError) as caught:
        read_source(make_recipe(source), raw=tmp_path / "raw")
    message = str(caught.value)
    assert f"{source}: not found in {tmp_path / 'raw'}" in message and "\n" not in message
    assert "`pipeline prepare --recipe own --download`" in message and "`--from FOLDER`" in message
    archive, folder = {
        "mnist": ("train-images-idx3-ubyte.gz and the 3 files beside it", tmp_path / "raw" / "MNIST" / "raw"),
        "cifar10": ("cifar-10-python.tar.gz", tmp_path / "raw"),
        "cifar100": ("cifar-100-python.tar.gz", tmp_path / "raw"),
    }[source]
    assert f"put {archive} in {folder}, or run" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("mnist", "t10k-labels-idx1-ubyte.gz"),
        ("mnist", "train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python/train"),
    ],
)
def test_a_source_as_downloaded_is_no_image_folder(tmp_path, source, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    for place in (tmp_path, tmp_path / file.split("/")[0]):
        with pytest.raises(
            UsageError, match=f"--from .*: these are {source}'s own files.*put .* in raw.*leave --from out"
        ):
            check_folder(make_recipe(source), Path("raw"), place)
    check_folder(make_recipe("folder"), Path("raw"), tmp_path)
    check_folder(make_recipe("mnist" if source != "mnist" else "cifar10"), Path("raw"), tmp_path)
    (tmp_path / "train").mkdir()
    check_folder(make_recipe(source), Path("raw"), tmp_path)


@pytest.fixture
def server(monkeypatch):
    """A local web server that answers with `server.content`, or 404 without one, and records the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404 if self.server.content is None else 200)
            self.send_header("Content-Length", str(len(self.server.content or b"")))
            self.end_headers()

        def do_GET(self):
            self.server.requests.append(self.path)
            self.do_HEAD()
            self.wfile.write(self.server.content or b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.requests = None, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        base = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{base}/one/", f"{base}/two/"])
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{base}/cifar-10-python.tar.gz")
        monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", f"{base}/cifar-100-python.tar.gz")
        yield server
        server.shutdown()
        thread.join()
    # torchvision leaves the answers of failed requests open; collected in a later test they would fail that one.
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("source", ["mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("content", [None, b"a page that asks to log in"])
def test_a_download_that_fails_is_one_line(tmp_path, server, source, content):
    server.content = content
    with pytest.raises(StorageError) as caught:
        read_source(make_recipe(source), raw=tmp_path, download=True)
    message = str(caught.value)
    assert "\n" not in message and f"{source}: cannot be fetched to {tmp_path}" in message
    assert ("404" if content is None else "corrupted") in message and "`--from FOLDER`" in message
    if content is not None:
        asked = {"mnist": "one", "cifar10": "cifar-10-python", "cifar100": "cifar-100-python"}
        assert server.requests[0].split("/")[1].partition(".")[0] == asked[source]  # then another mirror, if any


def test_without_a_network_the_download_is_one_line(tmp_path, server, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(StorageError, match=r"cifar100: cannot be fetched .*Connection refused"):
        read_source(make_recipe("cifar100"), raw=tmp_path, download=True)


def test_a_download_is_verified_unpacked_and_read(tmp_path, server, cifar, monkeypatch):
    archive = shutil.make_archive(str(tmp_path / "archive"), "gztar", tmp_path / "raw", "cifar-100-python")
    server.content = Path(archive).read_bytes()
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "tgz_md5", hashlib.md5(server.content).hexdigest())
    dataset, _ = read_source(make_recipe("cifar100"), raw=tmp_path / "new", download=True)
    assert np.array_equal(dataset.test.images, cifar[0][9:])
    server.requests.clear()
    read_source(make_recipe("cifar100"), raw=tmp_path / "new", download=True)
    assert server.requests == []


def test_a_full_disk_while_unpacking_is_a_storage_error(mnist, tmp_path, monkeypatch):
    def refuse(path, data):
        raise StorageError(f"cannot write {path}: No space left on device")

    path = mnist[0] / "train-labels-idx1-ubyte"
    (mnist[0] / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    monkeypatch.setattr(sources, "write_atomic", refuse)
    with pytest.raises(StorageError, match="No space left"):
        read_source(make_recipe("mnist"), raw=tmp_path / "raw")


# --- real files, where they are installed -------------------------------------------------------------------


@pytest.fixture
def real_data():
    """A folder with `mnist/*.gz` and `cifar100/{train,test}/<class>/<image>`."""
    if "TITN_DATASETS" not in os.environ:
        pytest.skip("TITN_DATASETS names no folder of real data")
    return Path(os.environ["TITN_DATASETS"])


def test_the_real_mnist_is_what_everybody_has(tmp_path, real_data):
    archives = sorted((real_data / "mnist").glob("*.gz"))
    if len(archives) != 4:
        pytest.skip("no four MNIST archives in TITN_DATASETS/mnist")
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for archive in archives:
        shutil.copy(archive, tmp_path / "MNIST" / "raw")
    dataset, _ = read_source(make_recipe("mnist"), raw=tmp_path)
    assert dataset.sha256 == "e6bcc1a7d7037147dfe7746ae63a6d1f836432f7b4b3482f2655f0b0f4ba83de"
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    unresized, _ = read_source(make_recipe("mnist", image_size=28), raw=tmp_path)
    assert unresized.mean[0] == pytest.approx(0.1307, abs=5e-5)
    assert unresized.std[0] == pytest.approx(0.3081, abs=5e-5)


def test_the_real_cifar100_is_what_everybody_has(tmp_path, real_data):
    folder = real_data / "cifar100"
    if not (folder / "train").is_dir():
        pytest.skip("no image folder TITN_DATASETS/cifar100")
    dataset, findings = read_source(make_recipe("cifar100"), raw=tmp_path, folder=list_source(folder))
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (50_000, 10_000, 100)
    assert findings.bad == findings.notes == []
    assert dataset.mean == pytest.approx((0.5071, 0.4865, 0.4409), abs=5e-5)
    assert np.bincount(dataset.train.labels).tolist() == [500] * 100
