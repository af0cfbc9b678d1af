"""The eight teachers: heads, weights from everywhere, and torchvision's traps at 32x32."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

from pipeline.errors import DataError, StorageError, UsageError
from pipeline.models import TEACHERS
from pipeline.models.teachers import build_teacher, imagenet_weights

SMALLEST = "squeezenet1_1"


def images(batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))


LARGE = ("vgg16", "vgg19", "wide_resnet50_2")  # of whose kind a smaller one is tested


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in TEACHERS]
)
def test_every_teacher_gives_finite_logits_at_32x32_and_its_whole_head_learns(name: str) -> None:
    torch.manual_seed(0)
    teacher = build_teacher(name, num_classes=7)
    assert teacher.training
    logits = teacher(images(4))
    assert logits.shape == (4, 7)
    assert logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    head = teacher.get_submodule(TEACHERS[name])
    assert (head.weight.grad.flatten(1).abs().amax(1) > 0).all()
    assert (head.bias.grad != 0).all()


@pytest.mark.parametrize("name", TEACHERS)
def test_only_the_head_differs_from_torchvisions_model(name: str) -> None:
    with torch.device("meta"):
        ours = build_teacher(name, num_classes=7).state_dict()
        theirs = models.get_model(name).state_dict()
    assert ours.keys() == theirs.keys()
    differing = {key for key in ours if ours[key].shape != theirs[key].shape}
    assert differing == {f"{TEACHERS[name]}.weight", f"{TEACHERS[name]}.bias"}


def test_the_eight_are_those_of_table_2_with_the_first_version_of_their_weights() -> None:
    assert list(TEACHERS) == [
        "densenet121",
        "mobilenet_v3_large",
        "resnet50",
        "wide_resnet50_2",
        "squeezenet1_1",
        "vgg16",
        "vgg16_bn",
        "vgg19",
    ]
    for name in TEACHERS:
        assert imagenet_weights(name) is models.get_model_weights(name).IMAGENET1K_V1
        assert imagenet_weights(name).url.startswith(f"https://download.pytorch.org/models/{name}-")


@pytest.mark.parametrize("name", TEACHERS)
def test_dropout_stays_where_torchvision_has_it(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_teacher(name, num_classes=7), models.get_model(name)
    rates = [[module.p for module in model.modules() if isinstance(module, nn.Dropout)] for model in (ours, theirs)]
    assert rates[0] == rates[1]


def test_squeezenets_fresh_head_is_half_dead_in_torchvision_and_alive_here() -> None:
    torch.manual_seed(0)
    ours = build_teacher(SMALLEST, num_classes=100).eval()
    theirs = models.squeezenet1_1(num_classes=100).eval()
    theirs.load_state_dict(ours.state_dict())
    logits, clipped = ours(images(8)), theirs(images(8))
    torch.testing.assert_close(clipped, logits.relu())
    assert (clipped == 0).all(dim=0).sum() > 25
    assert (logits != 0).all()


def test_vggs_pooling_repeats_one_vector_49_times_at_32x32() -> None:
    teacher = build_teacher("vgg16", num_classes=7).eval()
    features = teacher.features(images())
    assert features.shape == (2, 512, 1, 1)
    assert torch.equal(teacher.avgpool(features), features.expand(2, 512, 7, 7))


def test_batch_norm_momentum_is_the_architectures_own_unless_given() -> None:
    def momenta(**options: float) -> set[float | None]:
        with torch.device("meta"):
            teacher = build_teacher("mobilenet_v3_large", num_classes=7, **options)
        return {module.momentum for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)}

    assert momenta() == {0.01}
    assert momenta(bn_momentum=0.1) == {0.1}


def test_batch_norm_momentum_moves_the_running_statistics() -> None:
    teacher = build_teacher("mobilenet_v3_large", num_classes=7, bn_momentum=1.0)
    stem, norm = teacher.features[0][0], teacher.features[0][1]
    teacher(images())
    expected = stem(images()).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-5)


def saved(path: Path, state: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("file_name", ["w.safetensors", "w.pth"])
def test_weights_from_a_file_with_this_head_are_loaded_whole(tmp_path: Path, file_name: str) -> None:
    source = build_teacher(SMALLEST, num_classes=7)
    path = saved(tmp_path / file_name, source.state_dict())
    loaded = build_teacher(SMALLEST, num_classes=7, weights=path)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


@pytest.mark.parametrize("file_name", ["w.safetensors", "w.pth"])
def test_a_head_for_imagenet_in_a_file_is_replaced_by_a_fresh_one(tmp_path: Path, file_name: str) -> None:
    source = models.squeezenet1_1().state_dict()
    path = saved(tmp_path / file_name, source)
    loaded = build_teacher(SMALLEST, num_classes=7, weights=path)
    for key, value in loaded.state_dict().items():
        assert key.startswith("classifier.1") or torch.equal(value, source[key]), key
    head = loaded.get_submodule("classifier.1")
    assert head.weight.shape[0] == 7
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not head.bias.any()


def test_a_head_for_imagenet_is_kept_where_there_are_1000_classes(tmp_path: Path) -> None:
    source = models.squeezenet1_1().state_dict()
    loaded = build_teacher(SMALLEST, num_classes=1000, weights=saved(tmp_path / "w.pth", source))
    assert torch.equal(loaded.state_dict()["classifier.1.weight"], source["classifier.1.weight"])


def test_densenets_published_keys_with_dots_are_understood(tmp_path: Path) -> None:
    modern = models.densenet121().state_dict()
    published = {}
    for key, value in modern.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            if ".denselayer" in key:
                key = key.replace(f".{part}.", f".{part[:4]}.{part[4]}.")
        # The published file is older than these counters.
        if not key.endswith("num_batches_tracked"):
            published[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in published
    loaded = build_teacher("densenet121", num_classes=7, weights=saved(tmp_path / "w.pth", published))
    for key, value in loaded.state_dict().items():
        assert key.startswith("classifier") or torch.equal(value, modern[key]), key


def changed(state: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    state = dict(state)
    if change == "missing":
        del state["features.0.weight"]
    elif change == "unexpected":
        state["features.99.weight"] = torch.zeros(1)
    elif change == "shape":
        state["features.0.weight"] = torch.zeros(2, 2)
    else:
        state["classifier.1.weight"] = torch.zeros(9, 512, 1, 1)
    return state


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("missing", "lack the key 'features.0.weight'"),
        ("unexpected", "unknown key 'features.99.weight'"),
        ("shape", r"'features.0.weight' of shape \(2, 2\), not \(64, 3, 3, 3\)"),
        ("head", r"'classifier.1.weight' of shape \(9, 512, 1, 1\), not \(7, 512, 1, 1\)"),
    ],
)
@pytest.mark.parametrize("file_name", ["w.safetensors", "w.pth"])
def test_weights_that_do_not_fit_are_refused_naming_the_key(
    tmp_path: Path, file_name: str, change: str, named: str
) -> None:
    state = changed(build_teacher(SMALLEST, num_classes=7).state_dict(), change)
    with pytest.raises(DataError, match=f"teacher {SMALLEST}: .*{named}") as refusal:
        build_teacher(SMALLEST, num_classes=7, weights=saved(tmp_path / file_name, state))
    assert "\n" not in str(refusal.value)


class Malicious:
    """Unpickles into a call."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("called"),))


def contents(kind: str) -> bytes:
    buffer = io.BytesIO()
    state = {"features.0.weight": torch.zeros(64, 3, 3, 3)}
    torch.save({"call": Malicious()} if kind == "malicious" else [1] if kind == "list" else state, buffer)
    whole = buffer.getvalue()
    return {"empty": b"", "text": b"hello world, no checkpoint", "cut": whole[: len(whole) // 2]}.get(kind, whole)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "malicious", "list"])
def test_files_that_hold_no_state_dict_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
        path.write_bytes(contents(kind))
        with pytest.raises(DataError, match="state dict") as refusal:
            build_teacher(SMALLEST, num_classes=7, weights=str(path))
        assert "\n" not in str(refusal.value)
        assert str(path) in str(refusal.value)
    assert not Path("called").exists()


def test_a_path_that_does_not_exist_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist; choose imagenet, none or the path"):
        build_teacher(SMALLEST, num_classes=7, weights=str(tmp_path / "nothing.pth"))


def test_a_path_that_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        build_teacher(SMALLEST, num_classes=7, weights=str(tmp_path))


def test_an_unknown_teacher_is_refused_naming_the_choices() -> None:
    for call in (imagenet_weights, partial(build_teacher, num_classes=7)):
        with pytest.raises(UsageError, match="teacher 'alexnet' is unknown; choose one of densenet121, .*, vgg19"):
            call("alexnet")


class Recorder(SimpleHTTPRequestHandler):
    """Serves a folder and records the paths asked for."""

    requested: list[str]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@dataclasses.dataclass
class Mirror:
    """A local stand-in for download.pytorch.org."""

    folder: Path
    address: str
    requested: list[str]
    monkeypatch: pytest.MonkeyPatch

    def publish(self, state: dict[str, Tensor], digest: str | None = None) -> str:
        """Serve a state dict under a name ending in its SHA-256, or in `digest`, as SMALLEST's weights."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        digest = digest or hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
        file_name = f"{SMALLEST}-{digest}.pth"
        (self.folder / file_name).write_bytes(buffer.getvalue())
        self.point_at(f"{self.address}/{file_name}")
        return file_name

    def point_at(self, url: str) -> None:
        """Make `url` the address of SMALLEST's weights."""
        weights = models.Weights(url=url, transforms=nn.Identity, meta={})
        enum = models.WeightsEnum("LocalWeights", {"IMAGENET1K_V1": weights})
        self.monkeypatch.setattr(models, "get_model_weights", lambda name: enum)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    requested: list[str] = []
    handler = type("Handler", (Recorder,), {"requested": requested})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Mirror(folder, f"http://127.0.0.1:{server.server_port}", requested, monkeypatch)
        server.shutdown()
        thread.join()


def test_imagenet_weights_are_downloaded_once_checked_and_loaded(
    mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = models.squeezenet1_1().state_dict()
    file_name = mirror.publish(source)
    for _ in range(2):
        teacher = build_teacher(SMALLEST, num_classes=7, weights="imagenet")
        assert torch.equal(teacher.state_dict()["features.0.weight"], source["features.0.weight"])
        assert teacher(images()).shape == (2, 7)
    assert mirror.requested == [f"/{file_name}"]
    assert (tmp_path / "torch/hub/checkpoints" / file_name).exists()
    assert capsys.readouterr().out == ""


def test_a_download_with_another_hash_is_refused_and_not_kept(mirror: Mirror, tmp_path: Path) -> None:
    mirror.publish(models.squeezenet1_1().state_dict(), digest="0" * 8)
    with pytest.raises(DataError, match=f"teacher {SMALLEST}: .*{mirror.address}.*invalid hash") as refusal:
        build_teacher(SMALLEST, num_classes=7, weights="imagenet")
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "torch/hub/checkpoints").iterdir()) == []


@pytest.mark.parametrize("kind", ["empty", "text", "cut"])
def test_a_damaged_file_in_the_cache_is_named(mirror: Mirror, tmp_path: Path, kind: str) -> None:
    file_name = mirror.publish(models.squeezenet1_1().state_dict())
    cached = tmp_path / "torch/hub/checkpoints" / file_name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(contents(kind))
    with pytest.raises(DataError, match=f"{cached} is damaged; delete it and run again"):
        build_teacher(SMALLEST, num_classes=7, weights="imagenet")


def test_published_weights_of_another_architecture_are_refused(mirror: Mirror) -> None:
    mirror.publish(models.squeezenet1_0().state_dict())
    with pytest.raises(DataError, match="'features.0.weight' of shape"):
        build_teacher(SMALLEST, num_classes=7, weights="imagenet")


@pytest.mark.parametrize("failure", ["no server", "no file"])
def test_being_offline_is_one_line_with_the_ways_out(mirror: Mirror, failure: str) -> None:
    # Port 9 is discard: nothing listens there.
    url = f"{'http://127.0.0.1:9' if failure == 'no server' else mirror.address}/weights-00000000.pth"
    mirror.point_at(url)
    with pytest.raises(StorageError) as refusal:
        build_teacher(SMALLEST, num_classes=7, weights="imagenet")
    message = str(refusal.value)
    assert "\n" not in message
    for part in (f"teacher {SMALLEST}", url, "`weights: none`", "`weights: PATH`"):
        assert part in message
