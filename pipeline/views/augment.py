"""The augmentations of a view recipe, without mixing. Each class holds its draws, parameters, pixels and groups.

They work on whole uint8 batches, in the order of AUGMENTATIONS. Those that only move pixels are composed into one index
map, so that crop, flip, rotation and affine take one gather.

Source: arXiv:2502.16762 §3.4.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.recipes import ViewRecipe
from pipeline.views import boxes, draws, geometry, guard, operations, per_image, policies
from pipeline.views import colour as imageops
from pipeline.views.grouping import Groups, by_pixels, by_range
from pipeline.views.parcel import Later, Parcel

# By name, of N samples: uniform numbers, `(N, number)` float64 in [0, 1), or what an augmentation makes of its own.
Draws = Mapping[str, NDArray[Any]]
Parameters = dict[str, NDArray[Any]]
SUB_POLICY = "sub-policy"


class Augmentation:
    """One augmentation.

    To add one, write a subclass of Moving or Changing and add it to AUGMENTATIONS and its field to ViewRecipe. Draws
    are named, so the others' stay the same. An `absent` value of the field keeps the identities of existing labels.

    Attributes:
        fields: The fields of the view recipe that it reads, each with its number of draws per sample.
    """

    fields: ClassVar[Mapping[str, int]]

    def num_draws(self, recipe: ViewRecipe) -> dict[str, int]:
        """Return the number of draws per sample by name; a field at 0 or false draws nothing."""
        return {name: number for name, number in self.fields.items() if getattr(recipe, name)}

    def draw(
        self, uniforms: boxes.Draw, recipe: ViewRecipe, height: int, width: int, sizes: NDArray[np.int32] | None
    ) -> Draws:
        """Draw for all samples of a view; see `draw` below."""
        return {name: uniforms(name, number) for name, number in self.num_draws(recipe).items()}

    def parameters(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> Parameters:
        """Turn draws into the parameters of each image.

        Args:
            uniform: The draws of B samples, see Draws.
            recipe: The view recipe.
            height: H, pixels.
            width: W, pixels.

        Returns:
            Arrays of length B by name, only for the draws in `uniform`; reports count labels by them. None need be.
        """
        return {}

    def groups(self, drawn: Mapping[str, NDArray[Any]], recipe: ViewRecipe, image_size: int) -> Groups:
        """Group images by their parameters.

        Args:
            drawn: The parameters of all augmentations, for N images.
            recipe: The view recipe.
            image_size: Side of the images, pixels.
        """
        yield from ()


class Moving(Augmentation):
    """An augmentation that only moves pixels."""

    def plan(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel) -> Later:
        """Prepare index maps `(B, H, W)` int64, see pipeline.views.geometry.

        Args:
            uniform: As for `parameters`, and so are recipe, height and width.
            recipe: The view recipe.
            height: H, pixels.
            width: W, pixels.
            parcel: Takes what the device needs; the maps can be made when it has been sent.
        """
        raise NotImplementedError

    def plan_alone(
        self, uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel
    ) -> Callable[[Tensor], Tensor]:
        """Prepare the augmentation of images that nothing else moves, for which there may be a shorter way."""
        maps = self.plan(uniform, recipe, height, width, parcel)
        return lambda images: geometry.gather(images, maps())


class Changing(Augmentation):
    """An augmentation that changes levels, or moves pixels without an index map."""

    def plan(
        self, uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel
    ) -> Callable[[Tensor], Tensor]:
        """Prepare the augmentation of images `(B, 3, H, W)` uint8; the arguments are those of Moving."""
        raise NotImplementedError


class ResizedCrop(Augmentation):
    """Random box of the image, resized to the data set's square: it is read in place of the whole image.

    Parameters: `resized_crop` `(B, 4)` int64, the box in pixels of the upright image, left, top, right and bottom, the
    last two exclusive; `resized_crop_share` `(B,)`, its share of the image's area.
    """

    fields: ClassVar = {"resized_crop": 2}

    def draw(
        self, uniforms: boxes.Draw, recipe: ViewRecipe, height: int, width: int, sizes: NDArray[np.int32] | None
    ) -> Draws:
        """See Augmentation."""
        if not recipe.resized_crop:
            return {}
        assert sizes is not None, "resized_crop of images whose sizes are not known"
        wide = sizes.astype(np.int64)  # an area may exceed 32 bits
        drawn = boxes.crop_boxes(uniforms, wide, recipe.resized_crop)
        share = (drawn[:, 2:] - drawn[:, :2]).prod(axis=1) / wide.prod(axis=1)
        return {"resized_crop": drawn, "resized_crop_share": share}

    def parameters(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> Parameters:
        """See Augmentation."""
        return {name: uniform[name] for name in ("resized_crop", "resized_crop_share")}

    def groups(self, drawn: Mapping[str, NDArray[Any]], recipe: ViewRecipe, image_size: int) -> Groups:
        """See Augmentation."""
        if "resized_crop_share" in drawn:
            share, (low, high) = drawn["resized_crop_share"], recipe.resized_crop["scale"]
            yield from by_range("resized crop, share of the area", share, low, high, "{:.2f} to {:.2f}")


class CropFlip(Moving):
    """Random crop of the zero-padded image, and left-right flip.

    Parameters: `crop` `(B, 2)` int64, pixels by which the frame moves down and right; `flip` `(B,)` bool.
    """

    fields: ClassVar = {"crop": 2, "flip": 1}

    def parameters(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> Parameters:
        """See Augmentation."""
        given: Parameters = {}
        if "crop" in uniform:
            given["crop"] = draws.integers(uniform["crop"], 2 * recipe.crop + 1) - recipe.crop
        if "flip" in uniform:
            given["flip"] = uniform["flip"][:, 0] < 0.5
        return given

    def plan(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel) -> Later:
        """See Moving."""
        offsets, flipped = map(parcel.add, self._drawn(uniform, recipe, height, width))
        return lambda: geometry.crop_flip_maps(offsets(), flipped(), height, width)

    def _drawn(
        self, uniform: Draws, recipe: ViewRecipe, height: int, width: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return `crop` and `flip`; what is off does nothing."""
        given = self.parameters(uniform, recipe, height, width)
        num_samples = _num_samples(given)
        still, straight = np.zeros((num_samples, 2), dtype=np.int64), np.zeros(num_samples, dtype=np.bool_)
        return given.get("crop", still), given.get("flip", straight)

    def plan_alone(
        self, uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel
    ) -> Callable[[Tensor], Tensor]:
        """See Moving; without maps it is several times faster."""
        offsets, flips = self._drawn(uniform, recipe, height, width)
        if parcel.device.type == "cpu" and guard.why_not() is None:
            return functools.partial(per_image.crop_flip, offsets=offsets, flipped=flips)
        if recipe.crop:
            return super().plan_alone(uniform, recipe, height, width, parcel)
        flipped = parcel.add(np.flatnonzero(flips))
        return lambda images: images.index_copy_(0, flipped(), images.index_select(0, flipped()).flip(-1))

    def groups(self, drawn: Mapping[str, NDArray[Any]], recipe: ViewRecipe, image_size: int) -> Groups:
        """See Augmentation."""
        if "flip" in drawn:
            for name, flipped in (("left-right", True), ("none", False)):
                yield "flip", name, np.asarray(drawn["flip"] == flipped)
        if "crop" in drawn:
            yield from by_pixels("crop, moved by", drawn["crop"], recipe.crop)


class Rotation(Moving):
    """Random rotation about the centre. Parameters: `rotation` `(B,)` degrees, counter-clockwise."""

    fields: ClassVar = {"rotation": 1}

    def parameters(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> Parameters:
        """See Augmentation."""
        return _between(uniform, "rotation", 0.0, recipe.rotation)

    def plan(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel) -> Later:
        """See Moving."""
        angles = self.parameters(uniform, recipe, height, width)["rotation"]
        return geometry.plan_index_maps(geometry.rotation_matrices(angles, height, width), height, width, parcel)

    def groups(self, drawn: Mapping[str, NDArray[Any]], recipe: ViewRecipe, image_size: int) -> Groups:
        """See Augmentation."""
        if "rotation" in drawn:
            angle = np.abs(drawn["rotation"])
            yield from by_range("rotation, either way", angle, 0.0, recipe.rotation, "{:.1f}° to {:.1f}°")


class Affine(Moving):
    """Random shift by whole pixels, scaling and shear along x, in one pass, as torchvision's RandomAffine.

    Parameters: `translate` `(B, 2)` int64, pixels right and down; `scale` `(B,)`; `shear` `(B,)` degrees along x.
    """

    fields: ClassVar = {"translate": 2, "scale": 1, "shear": 1}

    def parameters(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> Parameters:
        """See Augmentation."""
        given: Parameters = {}
        if "translate" in uniform:
            shift = draws.between(uniform["translate"], -recipe.translate, recipe.translate)
            given["translate"] = np.rint(shift * [width, height]).astype(np.int64)
        return given | _between(uniform, "scale", 1.0, recipe.scale) | _between(uniform, "shear", 0.0, recipe.shear)

    def plan(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel) -> Later:
        """See Moving."""
        given = self.parameters(uniform, recipe, height, width)
        num_samples = _num_samples(given)
        translate = given.get("translate", np.zeros((num_samples, 2), dtype=np.int64))
        shear = np.zeros((num_samples, 2))
        shear[:, 0] = given.get("shear", 0.0)
        scale, center = given.get("scale", np.ones(num_samples)), (width * 0.5, height * 0.5)
        matrices = geometry.affine_matrices(translate, scale, shear, center)
        return geometry.plan_index_maps(matrices, height, width, parcel)

    def groups(self, drawn: Mapping[str, NDArray[Any]], recipe: ViewRecipe, image_size: int) -> Groups:
        """See Augmentation."""
        if "translate" in drawn:
            yield from by_pixels("translation", drawn["translate"], round(recipe.translate * image_size))
        if "shear" in drawn:
            yield from by_range("shear, either way", np.abs(drawn["shear"]), 0.0, recipe.shear, "{:.1f}° to {:.1f}°")
        yield from _by_factor(drawn, "scale", recipe.scale)


class Jitter(Changing):
    """Random brightness and contrast in random order, as torchvision's ColorJitter.

    Parameters: `brightness` and `contrast` `(B,)`, factors; where there are both, `brightness_first` `(B,)` bool.
    """

    fields: ClassVar = {"brightness": 1, "contrast": 1}

    def num_draws(self, recipe: ViewRecipe) -> dict[str, int]:
        """See Augmentation."""
        return super().num_draws(recipe) | ({"jitter-order": 1} if recipe.brightness and recipe.contrast else {})

    def parameters(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> Parameters:
        """See Augmentation."""
        given = _between(uniform, "brightness", 1.0, recipe.brightness)
        given |= _between(uniform, "contrast", 1.0, recipe.contrast)
        if "jitter-order" in uniform:
            given["brightness_first"] = uniform["jitter-order"][:, 0] < 0.5
        return given

    def plan(
        self, uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel
    ) -> Callable[[Tensor], Tensor]:
        """See Changing."""
        given = self.parameters(uniform, recipe, height, width)
        factors = {name: parcel.add(given[name]) for name in self.fields if name in given}
        if "contrast" not in factors:
            return lambda images: imageops.brightness(images, factors["brightness"]())
        if "brightness" not in factors:
            return lambda images: imageops.contrast(images, factors["contrast"]())
        is_first = given["brightness_first"]
        brightness_first, contrast_first = (parcel.add(np.flatnonzero(rows)) for rows in (is_first, ~is_first))

        def jitter(images: Tensor) -> Tensor:
            brightness, contrast = factors["brightness"](), factors["contrast"]()
            first, last = brightness_first(), contrast_first()
            jittered = torch.empty_like(images)
            jittered[first] = imageops.contrast(imageops.brightness(images[first], brightness[first]), contrast[first])
            jittered[last] = imageops.brightness(imageops.contrast(images[last], contrast[last]), brightness[last])
            return jittered

        return jitter

    def groups(self, drawn: Mapping[str, NDArray[Any]], recipe: ViewRecipe, image_size: int) -> Groups:
        """See Augmentation."""
        yield from _by_factor(drawn, "brightness", recipe.brightness)
        yield from _by_factor(drawn, "contrast", recipe.contrast)


class ChosenOperations(Changing):
    """The operations that AutoAugment, RandAugment or TrivialAugment chooses.

    Parameters, of the P operations for each image (2; TrivialAugment 1): `operations` `(B, P)` int64, indices into
    operations.OPERATIONS or operations.NO_OPERATION, and `magnitudes` `(B, P)` float64, signed, in the units of
    operations.magnitude; 0 where none is applied. With AutoAugment also `sub_policy` `(B,)` int64.
    """

    fields: ClassVar = {"autoaugment": 0, "magnitude": 0, "probability": 0, "magnitudes": 0}

    def num_draws(self, recipe: ViewRecipe) -> dict[str, int]:
        """See Augmentation."""
        policy = policies.policy(recipe)
        if policy is None:
            return {}
        return {policy.name: policy.num_draws} | ({"applied": 2} if recipe.probability < 1 else {})

    def parameters(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> Parameters:
        """See Augmentation."""
        choice = self._choose(uniform, recipe, height, width)
        given: Parameters = {"operations": choice.operations, "magnitudes": choice.magnitudes}
        if recipe.autoaugment == "cifar10":
            given["sub_policy"] = policies.sub_policies(uniform["autoaugment"])
        return given

    def plan(
        self, uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel
    ) -> Callable[[Tensor], Tensor]:
        """See Changing."""
        choice = self._choose(uniform, recipe, height, width)
        if parcel.device.type == "cpu" and guard.why_not() is None:
            return functools.partial(per_image.apply_operations, choice=choice)
        return operations.plan(choice, parcel)

    def groups(self, drawn: Mapping[str, NDArray[Any]], recipe: ViewRecipe, image_size: int) -> Groups:
        """Group by each operation that was applied, and by sub-policy where there are any."""
        if "operations" not in drawn:
            return
        title = policies.POLICIES[recipe.autoaugment].title
        yield title, "nothing applied", np.all(drawn["operations"] == operations.NO_OPERATION, axis=1)
        for number, name in sorted(enumerate(operations.OPERATIONS), key=lambda entry: entry[1]):
            yield title, name, np.any(drawn["operations"] == number, axis=1)
        if "sub_policy" in drawn:
            for number, sub_policy in enumerate(policies.CIFAR10_POLICY):
                name = ", ".join(f"{operation} {probability:g}" for operation, probability, _ in sub_policy)
                yield SUB_POLICY, f"{number + 1}: {name}", drawn["sub_policy"] == number

    def _choose(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> operations.OperationChoice:
        """Return what the recipe's policy does to each image."""
        policy = policies.policy(recipe)
        assert policy is not None, f"autoaugment: {recipe.autoaugment} chooses nothing"
        choice = policy.choose(uniform[policy.name], height, width)
        if "applied" not in uniform:
            return choice
        rows = np.where(uniform["applied"] < recipe.probability, choice.rows, operations.NO_OPERATION)
        return choice._replace(rows=rows)


class Erasing(Changing):
    """A random box becomes black. Parameters: `erasing` `(B, 4)` int64, see boxes; an empty box erases nothing.

    Differs: torchvision's RandomErasing works on floats, where by default 0 is black too.
    """

    fields: ClassVar = {"erasing": 1}

    def draw(
        self, uniforms: boxes.Draw, recipe: ViewRecipe, height: int, width: int, sizes: NDArray[np.int32] | None
    ) -> Draws:
        """See Augmentation."""
        return {"erasing": boxes.erased_boxes(uniforms, recipe.erasing, height, width)} if recipe.erasing else {}

    def parameters(self, uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> Parameters:
        """See Augmentation."""
        return {"erasing": uniform["erasing"]}

    def plan(
        self, uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel
    ) -> Callable[[Tensor], Tensor]:
        """See Changing."""
        erased = parcel.add(uniform["erasing"])
        return lambda images: images & ~boxes.inside(erased(), height, width)

    def groups(self, drawn: Mapping[str, NDArray[Any]], recipe: ViewRecipe, image_size: int) -> Groups:
        """See Augmentation."""
        if "erasing" in drawn:
            share = (drawn["erasing"][:, 2:] - drawn["erasing"][:, :2]).prod(axis=1) / image_size**2
            yield "erasing", "nothing", share == 0
            for operation, name, members in by_range("erasing", share, *boxes.ERASED["scale"], "{:.2f} to {:.2f}"):
                yield operation, name, members & (share > 0)


AUGMENTATIONS: tuple[Augmentation, ...] = (
    ResizedCrop(), CropFlip(), Rotation(), Affine(), Jitter(), ChosenOperations(), Erasing(),
)  # fmt: skip
"""All augmentations, in the order in which they are applied."""


def draw(
    uniforms: boxes.Draw, recipe: ViewRecipe, height: int, width: int, sizes: NDArray[np.int32] | None
) -> dict[str, NDArray[Any]]:
    """Draw a recipe's augmentations for all samples of a view; what is off draws nothing.

    Args:
        uniforms: Returns the uniform numbers of all N samples, by their name and number.
        recipe: The view recipe.
        height: H, pixels.
        width: W, pixels.
        sizes: `(N, 2)`, the widths and heights of the images before they are made H x W, pixels; None if not known.
    """
    drawn: dict[str, NDArray[Any]] = {}
    for augmentation in AUGMENTATIONS:
        drawn |= augmentation.draw(uniforms, recipe, height, width, sizes)
    return drawn


def parameters(uniform: Draws, recipe: ViewRecipe, height: int, width: int) -> Parameters:
    """Turn draws into the parameters of all augmentations; see Augmentation.parameters."""
    given: Parameters = {}
    for augmentation in AUGMENTATIONS:
        if augmentation.num_draws(recipe):
            given |= augmentation.parameters(uniform, recipe, height, width)
    return given


def plan(uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel) -> Callable[[Tensor], Tensor]:
    """Prepare all augmentations but mixing.

    Args:
        uniform: The draws of these samples by name.
        recipe: The view recipe.
        height: H, pixels.
        width: W, pixels.
        parcel: Takes what the device needs.

    Returns:
        Augments images `(B, 3, H, W)` uint8 on the parcel's device, perhaps in place, once it has been sent.
    """
    arguments = (uniform, recipe, height, width, parcel)
    used = [augmentation for augmentation in AUGMENTATIONS if augmentation.num_draws(recipe)]
    steps: list[Callable[[Tensor], Tensor]] = []
    for moves, together in itertools.groupby(used, lambda augmentation: isinstance(augmentation, Moving)):
        if moves:
            steps.append(_plan_moves([one for one in together if isinstance(one, Moving)], *arguments))
        else:
            steps += [one.plan(*arguments) for one in together if isinstance(one, Changing)]

    def augment(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return augment


def _plan_moves(
    moving: Sequence[Moving], uniform: Draws, recipe: ViewRecipe, height: int, width: int, parcel: Parcel
) -> Callable[[Tensor], Tensor]:
    """Prepare augmentations that follow each other and only move pixels."""
    arguments = (uniform, recipe, height, width, parcel)
    if len(moving) == 1:
        return moving[0].plan_alone(*arguments)
    maps = [one.plan(*arguments) for one in moving]
    return lambda images: geometry.gather(images, functools.reduce(geometry.compose, (make() for make in maps)))


def _num_samples(given: Parameters) -> int:
    return len(next(iter(given.values())))


def _between(uniform: Draws, name: str, middle: float, reach: float) -> Parameters:
    """Stretch the draws of a field, if any, over [middle - reach, middle + reach), `(B,)`."""
    if name not in uniform:
        return {}
    return {name: draws.between(uniform[name][:, 0], middle - reach, middle + reach)}


def _by_factor(drawn: Mapping[str, NDArray[Any]], name: str, reach: float) -> Groups:
    """Group by a factor in [1 - reach, 1 + reach], if it is drawn."""
    if name in drawn:
        yield from by_range(f"{name}, times", drawn[name], 1 - reach, 1 + reach, "{:.2f} to {:.2f}")
