"""The four students as wholes: geometry, dependence on the image, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.models.students import STUDENTS, Student, build_student, use_inner_block, use_outer_block

SMALL = {"num_classes": 7, "image_size": 16, "patch_size": 8, "width": 24, "depth": 2}
WITH_PIXELS = [name for name, student in STUDENTS.items() if student.has_pixels]


def images(batch_size: int, image_size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(seed))


def built(name: str, **geometry: int) -> Student:
    torch.manual_seed(0)
    return build_student(name, **{**SMALL, **geometry}).eval()


def heads(student: Student, batch: Tensor) -> tuple[Tensor, ...]:
    """The logits of every head, the class head first."""
    output = student(batch)
    return output if student.has_distillation_head else (output,)


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("geometry", [{}, {"patch_size": 16, "pixel_size": 4}, {"image_size": 48}])
def test_every_head_gives_finite_logits_of_its_shape(name: str, geometry: dict[str, int]) -> None:
    torch.manual_seed(0)
    student = build_student(name, num_classes=7, depth=2, **geometry)
    logits = heads(student, images(3, geometry.get("image_size", 32)))
    assert len(logits) == 1 + student.has_distillation_head
    for head in logits:
        assert head.shape == (3, 7)
        assert head.dtype == torch.float32
        assert head.isfinite().all()


def test_the_registry_says_which_students_have_which_parts() -> None:
    assert list(STUDENTS) == ["vit", "deit", "tnt", "titn"]
    assert [name for name, student in STUDENTS.items() if student.has_distillation_head] == ["deit", "titn"]
    assert WITH_PIXELS == ["tnt", "titn"]


@pytest.mark.parametrize("name", STUDENTS)
def test_an_images_logits_do_not_depend_on_its_batch(name: str) -> None:
    student = built(name).double()
    batch = images(5).double()
    for together, alone in zip(heads(student, batch), heads(student, batch[2:3]), strict=True):
        torch.testing.assert_close(together[2:3], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_loss_of_all_heads_reaches_every_parameter(name: str) -> None:
    student = built(name)
    sum(head[:, 0].sum() for head in heads(student, images(2))).backward()
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", ["deit", "titn"])
@pytest.mark.parametrize(("trained", "other"), [(0, "distillation"), (1, "class")])
def test_a_head_gets_no_gradient_from_the_other_heads_loss(name: str, trained: int, other: str) -> None:
    student = built(name)
    heads(student, images(2))[trained][:, 0].sum().backward()
    for key, parameter in student.named_parameters():
        if key.startswith(f"{other}_head"):
            assert parameter.grad is None, key
        elif "_head" in key:
            assert parameter.grad.any(), key


@pytest.mark.parametrize("name", STUDENTS)
def test_every_patch_of_the_image_reaches_every_head(name: str) -> None:
    student = built(name)
    batch = images(1).requires_grad_()
    for head in heads(student, batch):
        (gradient,) = torch.autograd.grad(head[0, 0], batch, retain_graph=True)
        patches = gradient.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((0, 1, 4, 5))
        assert (patches > 0).all()


def permuted_patches(batch: Tensor) -> Tensor:
    """Swap the four 8x8 patches of 16x16 images cyclically."""
    rows = batch.unflatten(2, (2, 8)).unflatten(4, (2, 8))
    patches = rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, [1, 2, 3, 0]]
    return patches.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(batch.shape)


@pytest.mark.parametrize("name", STUDENTS)
def test_without_positions_the_order_of_patches_does_not_matter_and_with_them_it_does(name: str) -> None:
    student = built(name).double()
    batch = images(2).double()
    for ours, theirs in zip(heads(student, batch), heads(student, permuted_patches(batch)), strict=True):
        assert not torch.allclose(ours, theirs)
    # A patch is told from its neighbours by the rows between the class token and the distillation token.
    for key, parameter in student.named_parameters():
        if key in ("positions", "patch_positions", "patch_tokens"):
            parameter.data[1:5] = parameter.data[1].clone()
    for ours, theirs in zip(heads(student, batch), heads(student, permuted_patches(batch)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WITH_PIXELS)
def test_the_image_enters_by_the_pixels_alone(name: str) -> None:
    student = built(name)
    for block in student.blocks:
        torch.nn.init.zeros_(block.pixels_to_patch.weight)
    for head in heads(student, images(4)):
        assert torch.equal(head, head[:1].expand_as(head))


@pytest.mark.parametrize("name", ["deit", "titn"])
def test_the_two_heads_read_different_tokens(name: str) -> None:
    student = built(name)
    student.distillation_head.load_state_dict(student.class_head.state_dict())
    class_logits, distillation_logits = student(images(2))
    assert not torch.allclose(class_logits, distillation_logits)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_seed_fixes_the_initialisation(name: str) -> None:
    first, second = built(name).state_dict(), built(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, int]:
    """Any geometry that divides evenly."""
    pixel_size = draw(st.integers(1, 3))
    patch_size = pixel_size * draw(st.integers(1, 3))
    pixel_heads, num_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "num_classes": draw(st.integers(1, 5)),
        "pixel_size": pixel_size,
        "patch_size": patch_size,
        "image_size": patch_size * draw(st.integers(1, 3)),
        "pixel_heads": pixel_heads,
        "pixel_width": pixel_heads * draw(st.integers(1, 4)),
        "num_heads": num_heads,
        "width": num_heads * draw(st.integers(1, 4)),
        "depth": draw(st.integers(1, 2)),
        "mlp_ratio": draw(st.integers(1, 3)),
    }


@pytest.mark.parametrize("name", STUDENTS)
@settings(max_examples=25)
@given(geometry=geometries())
def test_any_geometry_that_divides_evenly_works(name: str, geometry: dict[str, int]) -> None:
    student = build_student(name, **geometry)
    for head in heads(student, images(2, geometry["image_size"])):
        assert head.shape == (2, geometry["num_classes"])
        assert head.isfinite().all()


@pytest.mark.parametrize(
    ("name", "geometry", "numbers"),
    [
        *((name, {"patch_size": 5}, "patch_size 5 does not divide image_size 32") for name in STUDENTS),
        *((name, {"num_heads": 5}, "num_heads 5 does not divide width 192") for name in STUDENTS),
        *((name, {"pixel_size": 3}, "pixel_size 3 does not divide patch_size 8") for name in WITH_PIXELS),
        *((name, {"pixel_heads": 5}, "pixel_heads 5 does not divide pixel_width 12") for name in WITH_PIXELS),
    ],
)
def test_a_geometry_that_does_not_divide_is_refused_naming_both_numbers(
    name: str, geometry: dict[str, int], numbers: str
) -> None:
    with pytest.raises(UsageError, match=numbers) as refusal:
        build_student(name, num_classes=10, **geometry)
    assert "\n" not in str(refusal.value)


def test_an_unknown_student_is_refused_naming_the_choices() -> None:
    with pytest.raises(UsageError, match="model 'swin' is not a student; choose one of vit, deit, tnt, titn"):
        build_student("swin", num_classes=10)


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_students_without_pixels_ignore_the_geometry_of_the_inner_path(name: str) -> None:
    student = built(name, pixel_size=3, pixel_width=5, pixel_heads=7)
    assert student.state_dict().keys() == built(name).state_dict().keys()


@pytest.mark.parametrize("name", STUDENTS)
def test_a_misspelt_geometry_is_not_ignored(name: str) -> None:
    with pytest.raises(TypeError, match="pixel_sizes"):
        build_student(name, num_classes=10, pixel_sizes=2)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_that_is_moved_or_converted_computes_by_its_modules(name: str) -> None:
    student, batch, cpu = built(name), images(3), torch.device("cpu")
    expected = heads(copy.deepcopy(student).double(), batch.double())
    use_inner_block(student, "auto", cpu, training=False)
    use_outer_block(student, "auto", cpu, training=False)
    with torch.no_grad():
        for one, other in zip(heads(copy.deepcopy(student).double(), batch.double()), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert heads(copy.deepcopy(student).to("meta"), batch.to("meta"))[0].shape == (3, 7)
        for one, other in zip(heads(student, batch), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", STUDENTS)
def test_a_plain_student_calls_every_layer_and_can_be_traced(name: str) -> None:
    student, batch, called = built(name), images(2), list[str]()
    use_inner_block(student, "auto", torch.device("cpu"), training=False)
    use_outer_block(student, "auto", torch.device("cpu"), training=False)
    student.plain = True
    layers = {path: module for path, module in student.named_modules() if not list(module.children())}
    for path, module in layers.items():
        module.register_forward_hook(lambda *_, path=path: called.append(path))
    with torch.no_grad():
        expected = heads(student, batch)
        assert set(called) == set(layers)
        traced = torch.jit.trace(student, batch)(batch)
    for one, other in zip(traced if len(expected) == 2 else (traced,), expected, strict=True):
        torch.testing.assert_close(one, other)
