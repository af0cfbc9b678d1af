"""Recipes: frozen dataclasses for every number in params.yaml.

A recipe describes one data set's whole experiment. Each field carries its range or its choices as metadata, by
which `pipeline.config.params` checks what it loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

SOURCES = ("digits", "mnist", "cifar10", "cifar100", "folder")
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
DECAYS = ("all", "matrices")
PRECISIONS = ("auto", "fp32", "bf16")
STEPS = ("auto", "eager", "graph")
BLOCKS = ("auto", "plain", "fused")
STORES = PIXELS, ENCODED = ("pixels", "encoded")
RESIZES = SQUEEZE, CROP = ("squeeze", "crop")
MAX_VIEWS = 100_000
RANDAUGMENT = ("autoaugment", ("randaugment",))


def setting(
    default: Any = dataclasses.MISSING,
    *,
    absent: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
    **limits: Any,
) -> Any:
    """Declare a field of a recipe.

    Args:
        default: The value if params.yaml gives none. A field without a default must be in params.yaml.
        absent: For a field added after version 0.1.0: the value under which results are as before the field existed.
            `deciding_values` leaves a field with this value out, so that recorded results stay valid. It is given
            apart from `default`, which may change later. Fields of version 0.1.0 have none and are always written.
        default_factory: Makes the default of a mapping.
        limits: What `pipeline.config.params` checks values against: `range`, `off`, `choices`, `spans` or `needs`, the
            field that it is of and that field's values. Also `decides`: False for a field that `deciding_values` never
            writes, since something else that is recorded tells more.
    """
    metadata = limits if absent is dataclasses.MISSING else {**limits, "absent": absent}
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata, hash=False)
    return dataclasses.field(default=default, metadata=metadata)


def number(low: float, high: float, *default: float, off: float | None = None, **rest: Any) -> Any:
    """Declare a field that holds a number in [low, high], or `off`; see `setting` for the rest."""
    return setting(*default, range=(low, high), off=off, **rest)


def choice(choices: tuple[str, ...], *default: str, **rest: Any) -> Any:
    """Declare a field that holds one of `choices`; see `setting` for the rest."""
    return setting(*default, choices=choices, **rest)


def spans(**limits: tuple[tuple[float, float], list[float]]) -> Any:
    """Declare a field that holds [low, high] by name, or nothing, an empty mapping.

    Args:
        limits: By name, between which numbers the span must lie, and the span where the name is left out.
    """
    return setting(default_factory=dict, absent={}, spans=limits)


@dataclass(frozen=True)
class Removed:
    """A field that a recipe no longer has.

    Attributes:
        name: The field's name. No later field may take it.
        absent: The value under which results were as they are now; the only one that params.yaml may still give.
        is_written: Whether `deciding_values` writes the field with `absent`; true only for fields of version 0.1.0.
    """

    name: str
    absent: Any
    is_written: bool = False


@dataclass(frozen=True, kw_only=True)
class RecipeSection:
    """A part of params.yaml that decides results.

    Attributes:
        removed: The fields that it no longer has.
    """

    removed: ClassVar[tuple[Removed, ...]] = ()


def deciding_values(section: RecipeSection, *, but: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of a recipe that decide a result, as plain JSON values.

    The identities of label caches, runs and prepared data are all made of these. Equal results give equal values in
    every version of this project: see `setting` for a field that is added, and `Removed` for one that is removed.

    Args:
        section: The recipe.
        but: Names of fields that do not decide the result.
    """
    values = {old.name: old.absent for old in section.removed if old.is_written}
    for field in dataclasses.fields(section):
        if not field.metadata.get("decides", True):
            continue
        value = getattr(section, field.name)
        if field.type in ("float", float):
            value = float(value)  # a recipe made in Python may say 10 where the field means 10.0
        if isinstance(value, Mapping):
            value = dict(value)
        if "absent" not in field.metadata or value != field.metadata["absent"]:
            values[field.name] = value
    return {name: value for name, value in values.items() if name not in but}


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe(RecipeSection):
    """What `prepare` makes.

    Attributes:
        source: Where the images come from, one of SOURCES.
        image_size: Side of the square RGB images, pixels.
        val_fraction: Share of train cut off as a stratified validation split; 0 evaluates on test (the paper's
            protocol).
        test_fraction: Share cut off as a stratified test split where the source has none (digits, a folder
            without `test/`).
        split_seed: Seed of both splits.
        resize: How an image of another shape becomes the square that models are evaluated on: `squeeze`, whatever its
            aspect ratio; or `crop`, the middle of it, after its shorter side is brought to image_size / 0.875.
        path: An image folder or CSV file to read instead of the source's own files, relative to the project; empty for
            none. It is not compared when data are opened: their SHA-256 is.
        store: `pixels`, uint8 squares of `image_size`; or `encoded`, the bytes of a folder's files themselves, which
            are decoded for every batch.
        max_side: Of an encoded store: images with a longer side, pixels, are reduced to it and kept as JPEG of quality
            pipeline.data.encoded.QUALITY; 0 leaves every file as it is.
    """

    source: str = choice(SOURCES)
    image_size: int = number(4, 1024, 32)
    val_fraction: float = number(0.0, 0.9, 0.0)
    test_fraction: float = number(0.01, 0.9, 0.2)
    split_seed: int = number(0, 2**31 - 1, 0)
    resize: str = choice(RESIZES, SQUEEZE, absent=SQUEEZE)
    path: str = setting("", absent="", decides=False)
    store: str = choice(STORES, PIXELS, absent=PIXELS)
    max_side: int = number(64, 65_535, 0, off=0, absent=0)


@dataclass(frozen=True, kw_only=True)
class ViewRecipe(RecipeSection):
    """One way of augmenting the training set; operations run in the order of these fields.

    pipeline.views.augment.AUGMENTATIONS carries out each field, pipeline.views.mixing.MIXINGS `mixing`.

    Attributes:
        seed: Seed of every draw.
        count: Number of views labelled, V. Not part of the identity: a cache can be extended.
        resized_crop: `{scale: [low, high], ratio: [low, high]}`: a box of the image, resized to the data set's square.
            Its share of the image's area is drawn uniformly from `scale`, its width by its height log-uniformly from
            `ratio`. Needs the images' own sizes, `store: encoded`. `{}` leaves it out.
        crop: Zero padding of the random crop, pixels; 0 leaves it out.
        flip: Flip left-right with probability 1/2.
        rotation: Largest angle, degrees, drawn uniformly from [-rotation, rotation].
        translate: Largest shift as a share of the side, drawn uniformly per axis.
        scale: Largest relative change of scale, drawn uniformly from [1 - scale, 1 + scale].
        shear: Largest shear along x, degrees, drawn uniformly.
        brightness: Colour jitter: factor drawn uniformly from [1 - brightness, 1 + brightness].
        contrast: Colour jitter: factor drawn uniformly from [1 - contrast, 1 + contrast].
        autoaugment: `none`; `cifar10`, AutoAugment with its policy for CIFAR-10; `randaugment`, RandAugment with 2
            operations; or `trivialaugment`, TrivialAugment with its wide magnitudes.
        magnitude: Of RandAugment: how strong its operations are, 0 to 30, or 0 to 10 of timm.
        probability: Of RandAugment: that each of the 2 operations is applied.
        magnitudes: Of RandAugment: `torchvision`, its operations and magnitudes; or `timm`, those of timm's `inc1`.
        erasing: Probability that a box of 2 to 33 % of the area becomes black.
        mixing: `none`, `cutmix`, `mixup`, or `both`, one of the two for each sample, equally likely.
        mixing_probability: That a sample mixes at all.
        cutmix_alpha: Lambda of CutMix is drawn from Beta(alpha, alpha).
        mixup_alpha: Lambda of MixUp is drawn from Beta(alpha, alpha).
        partner: Whom a sample mixes with: `uniform`, any sample; or `paired`: the samples of a view form pairs that mix
            with each other, so that an image is decoded once for both. Of an encoded store, params.yaml's default is
            `paired`.

    Source: arXiv:2502.16762 §3.4, §4.1; RandAugment arXiv:1909.13719, TrivialAugment arXiv:2103.10158, random erasing
        arXiv:1708.04896.
    """

    seed: int = number(0, 2**31 - 1, 0)
    count: int = number(1, MAX_VIEWS)
    resized_crop: Mapping[str, list[float]] = spans(
        scale=((0.0001, 1.0), [0.08, 1.0]), ratio=((0.01, 100.0), [3 / 4, 4 / 3])
    )
    crop: int = number(0, 256, 0)
    flip: bool = False
    rotation: float = number(0.0, 180.0, 0.0)
    translate: float = number(0.0, 0.9, 0.0)
    scale: float = number(0.0, 0.9, 0.0)
    shear: float = number(0.0, 60.0, 0.0)
    brightness: float = number(0.0, 1.0, 0.0)
    contrast: float = number(0.0, 1.0, 0.0)
    autoaugment: str = choice(("none", "cifar10", "randaugment", "trivialaugment"), "none")
    magnitude: int = number(0, 30, 9, absent=9, needs=RANDAUGMENT)
    probability: float = number(0.0, 1.0, 1.0, absent=1.0, needs=RANDAUGMENT)
    magnitudes: str = choice(("torchvision", "timm"), "torchvision", absent="torchvision", needs=RANDAUGMENT)
    erasing: float = number(0.0, 1.0, 0.0, absent=0.0)
    mixing: str = choice(("none", "cutmix", "mixup", "both"), "none")
    mixing_probability: float = number(0.0, 1.0, 1.0, absent=1.0, needs=("mixing", ("cutmix", "mixup", "both")))
    cutmix_alpha: float = number(0.01, 100.0, 0.5, absent=0.5, needs=("mixing", ("cutmix", "both")))
    mixup_alpha: float = number(0.01, 100.0, 0.5, absent=0.5, needs=("mixing", ("mixup", "both")))
    partner: str = choice(
        ("uniform", "paired"), "uniform", absent="uniform", needs=("mixing", ("cutmix", "mixup", "both"))
    )


@dataclass(frozen=True, kw_only=True)
class FitRecipe(RecipeSection):
    """How a model is trained.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Samples a step, over all ranks.
        optimizer: One of OPTIMIZERS.
        lr: Peak learning rate.
        momentum: Of sgd and rmsprop; beta1 of adam and adamw.
        weight_decay: L2 penalty; decoupled for adamw.
        decay: What it acts on: `all` parameters, as in the paper; or `matrices`, the weights of linear and convolution
            layers, which leaves out norms, biases, tokens and positions.
        schedule: `cosine` to zero after the last step, or `constant`.
        warmup_epochs: Linear warm-up from 0, in epochs, may be fractional; at most `epochs`.
        clip: Largest gradient norm; 0 leaves gradients alone.
        label_smoothing: Of the ground-truth targets.
        precision: `fp32`, `bf16` (autocast), or `auto`: bf16 where the device has units for it (CUDA from Ampere on,
            AMX, AVX-512 BF16).
        step: `eager`; `graph`, replayed from a CUDA graph; or `auto`: graph on a CUDA device with one process.
        compile: Whether torch.compile prepares the model. Needs a C++ compiler, takes minutes, and rounds differently.
    """

    epochs: int = number(1, 100_000)
    batch_size: int = number(1, 1_000_000)
    optimizer: str = choice(OPTIMIZERS, "sgd")
    lr: float = number(0.0, 100.0)
    momentum: float = number(0.0, 0.9999, 0.9)
    weight_decay: float = number(0.0, 10.0, 1e-4)
    decay: str = choice(DECAYS, "all", absent="all")
    schedule: str = choice(("cosine", "constant"), "cosine")
    warmup_epochs: float = number(0.0, 1000.0, 0.0)
    clip: float = number(0.0, 1e6, 0.0)
    label_smoothing: float = number(0.0, 0.99, 0.0)
    precision: str = choice(PRECISIONS, "auto")
    step: str = choice(STEPS, "auto")
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe(FitRecipe):
    """How one teacher is fine-tuned, on the view recipe `default` under draws of its own.

    Attributes:
        epochs: Passes over the training set; 0 takes a finished teacher as it is.
        weights: `imagenet` (torchvision or timm downloads them), `none` (random; a user's function returns what it
            likes), or the path of a state dict.
        bn_momentum: Momentum of every batch norm; 0 keeps the architecture's own.
        model: One of the eight of pipeline.models.TEACHERS, `torchvision/NAME`, `timm/NAME` or `FILE.py:FUNCTION`. In
            params.yaml it defaults to the teacher's name. The checkpoint's description holds it.
        input_size: Side at which the teacher sees the images, pixels; 0 is the data set's for the eight and with
            `stem: cifar`, the model's own for others. The description's arguments hold it.
        normalization: By which mean and std: the `data` set's; the `model`'s own; or `auto`: the data set's for the
            eight, the model's own for others where its weights are ImageNet's. The description holds what comes of it.
        stem: `cifar` replaces the first convolution of ResNets and DenseNets by one of 3x3 and stride 1, and takes out
            the pooling behind it. The description's arguments hold it.
    """

    epochs: int = number(0, 100_000)
    weights: str = "imagenet"
    bn_momentum: float = number(0.0, 1.0, 0.0)
    model: str = setting("", absent="", decides=False)
    input_size: int = number(1, 4096, 0, off=0, absent=0, decides=False)
    normalization: str = choice(("auto", "data", "model"), "auto", absent="auto", decides=False)
    stem: str = choice(("default", "cifar"), "default", absent="default", decides=False)


@dataclass(frozen=True, kw_only=True)
class StudentRecipe(FitRecipe):
    """How one student is built and distilled.

    Attributes:
        model: Architecture, a key of pipeline.models.students.STUDENTS; `timm/NAME`; or `FILE.py:FUNCTION`, which is
            run. The last two have none of the geometry below.
        views: Name of the view recipe it trains on.
        alpha: Weight of the distillation term of equation 10.
        patch_size: Side of a patch, pixels.
        pixel_size: Side of an inner token, pixels (tnt and titn).
        width: Embedding width D.
        depth: Number of blocks L.
        num_heads: Heads of the outer attention.
        pixel_width: Width c of the inner tokens (tnt and titn).
        pixel_heads: Heads of the inner attention (tnt and titn).
        soft: Temperature of soft distillation, T; 0 learns from the argmax. Above 0 it needs a distillation head and
            the teacher's probabilities, which `LabelRecipe.topk` keeps.
        ema: Share of the old value that an exponential moving average of the weights keeps in each step; the average
            is what is evaluated and kept. 0 keeps none.
        drop_path: Rate of stochastic depth in the last block; it rises linearly from 0 in the first. In training each
            branch is left out with this probability, for each image by a draw of its own. 0 leaves none out.
        inner_block: How inner blocks are computed (tnt and titn): `plain`, by PyTorch's own operations; `fused`, in
            C++ on a CPU or Triton on CUDA; `auto`: fused where it is available.
        outer_block: How the blocks between patches compute what is between their matrix products: `plain`, by PyTorch's
            own operations; `fused`, in C++ on a CPU, joined by torch.compile on CUDA; `auto`: fused where it is
            available and the model is not compiled.
        micro_batch: Samples of a rank that go through the model at once; their gradients add up to the whole batch's.
            0 chooses: 128 on a CPU, all elsewhere.
        arguments: What else the architecture's constructor takes, as `{window: 4}`; see
            pipeline.models.students.check_arguments.
    """

    model: str
    views: str = "default"
    alpha: float = number(0.0, 1.0, 0.5)
    patch_size: int = number(1, 1024, 8)
    pixel_size: int = number(1, 1024, 2)
    width: int = number(1, 8192, 192)
    depth: int = number(1, 256, 12)
    num_heads: int = number(1, 256, 3)
    pixel_width: int = number(1, 1024, 12)
    pixel_heads: int = number(1, 256, 2)
    micro_batch: int = number(0, 1_000_000, 0)
    soft: float = number(0.01, 1000.0, 0.0, off=0.0, absent=0.0)
    ema: float = number(0.0, 0.999999, 0.0, absent=0.0)
    drop_path: float = number(0.0, 0.9, 0.0, absent=0.0)
    inner_block: str = choice(BLOCKS, "auto")
    outer_block: str = choice(BLOCKS, "auto", absent="auto")
    arguments: Mapping[str, int | float | str | bool] = setting(default_factory=dict, absent={})


@dataclass(frozen=True, kw_only=True)
class SelectRecipe(RecipeSection):
    """How the winner is chosen.

    Attributes:
        by: The metric that must be highest, of the best epoch on the evaluation split; of equals the lower loss counts.
    """

    by: str = choice(("top1", "top5", "f1"), "top1")


@dataclass(frozen=True, kw_only=True)
class LabelRecipe(RecipeSection):
    """How the winner labels views.

    Attributes:
        batch_size: Images a forward pass, at most 4096 of 32 x 32 pixels; of larger images fewer.
        precision: See FitRecipe.
        topk: Classes kept of each sample with their probabilities, for soft distillation; 0 keeps the argmax alone.
        compile: Whether torch.compile prepares the teacher. Needs a C++ compiler, takes from seconds to a minute in
            every process that labels, and rounds differently.
    """

    batch_size: int = number(1, 1_000_000, 512)
    precision: str = choice(PRECISIONS, "auto")
    topk: int = number(0, 65535, 0)
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole experiment on one data set."""

    name: str
    dataset: DatasetRecipe
    views: Mapping[str, ViewRecipe]
    teachers: Mapping[str, TeacherRecipe]
    select: SelectRecipe
    label: LabelRecipe
    students: Mapping[str, StudentRecipe]
