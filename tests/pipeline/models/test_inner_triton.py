"""The fused inner block for CUDA: its formulas on Triton's interpreter, its machine code, and itself on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.models.students import build_student, use_inner_block
from pipeline.models.students.fused import cuda as inner_triton
from pipeline.models.students.fused import guard
from pipeline.models.students.fused.cuda import inner_block, why_not
from pipeline.models.students.fused.interface import InnerWeights
from pipeline.models.students.fused.tiles import Geometry, geometry
from tests.support.inner_block_cases import case, errors, outcome

ROOT = Path(__file__).parents[3]
# Of one multiprocessor of an H100 or H200.
NUM_REGISTERS = 65_536
SHARED_BYTES = 227 * 1024
SHARED_AND_L1_BYTES = 256 * 1024


@pytest.fixture
def triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return pytest.importorskip("triton", minversion="3.5")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_interpreted_kernels_are_the_modules(triton: Any, which: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-o",
            "addopts=",
            "-m",
            which,
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore:Conversion of an array:DeprecationWarning",  # Triton 3.5's, from NumPy 1
            "tests/support/inner_triton_interpreted.py",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_says_which_geometries_it_leaves_alone(triton: Any) -> None:
    assert why_not(16, 12, 2, 48) is None
    assert why_not(64, 31, 1, 124) is None
    assert why_not(65, 12, 2, 48) == "a patch has 65 pixel tokens, more than 64"
    assert why_not(16, 32, 2, 128) == "pixel tokens are 32 wide, more than 31"
    assert why_not(16, 12, 2, 144) == "the hidden layer is 144 wide, more than 128"
    assert why_not(16, 12, 5, 48) == "5 heads do not divide the width 12"


def test_it_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner_triton, "find_spec", lambda name: None)
    assert why_not.__wrapped__(16, 12, 2, 48) == "Triton is not installed"


def test_it_says_that_the_gpu_is_another(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert why_not.__wrapped__(16, 12, 2, 48) == "PyTorch is built for ROCm, and the kernels for CUDA"


def test_it_says_that_triton_is_too_old(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.4.1+git1234")
    assert why_not.__wrapped__(16, 12, 2, 48) == "Triton 3.4.1+git1234 is older than 3.5"


@pytest.mark.parametrize("num_pixels", [1, 4, 5, 16, 17, 49, 64])
@pytest.mark.parametrize("width", [1, 6, 12, 15, 16, 31])
def test_tiles_hold_whole_patches_and_a_column_of_ones(num_pixels: int, width: int) -> None:
    of = geometry(num_pixels, width, 1, 4 * width, "tf32")
    assert of.spacing >= num_pixels and of.rows % of.spacing == 0 and of.columns > width
    assert of.chunk * (of.num_chunks - 1) < of.hidden <= of.chunk * of.num_chunks
    assert all(size >= 16 and size & (size - 1) == 0 for size in (of.rows, of.columns, of.chunk))


def machine_code(triton: Any, kernel: Any, of: Geometry, file: Path) -> dict[str, int]:
    """Compile for an H200; return registers and spilled bytes of a thread and shared bytes of a program."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipeline.models.students.fused.triton_forward import constants

    pointers = {"weights", "targets"}
    signature: dict[str, Any] = {name: "*fp32" for name in kernel.arg_names} | {"num_patches": "i32", "of": "constexpr"}
    signature |= {name: InnerWeights(*["*fp32"] * 13) for name in pointers & signature.keys()}
    signature |= {"size": "i32"} if "size" in signature else {}
    aligned = [["tt.divisibility", 16]]
    places: list[tuple[int, ...]] = []
    for index, name in enumerate(kernel.arg_names):
        places += [(index,)] if signature[name] == "*fp32" else []
        places += [(index, part) for part in range(13)] if name in pointers else []
    source = ASTSource(kernel, signature, {"of": constants(of)}, {place: aligned for place in places})
    options = {"num_warps": of.num_warps, **inner_triton.OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    file.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    used = subprocess.run([cuobjdump, "--dump-resource-usage", file], check=True, capture_output=True, text=True).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
    return {
        "registers": counts["REG"],
        "spilled": counts["STACK"] + counts["LOCAL"],
        "shared": int(compiled.metadata.shared),
    }


@pytest.mark.slow
def test_the_forward_kernel_spills_nothing(triton: Any, tmp_path: Path) -> None:
    from pipeline.models.students.fused.triton_forward import forward_kernel

    for precision in ("tf32", "tf32x3"):
        used = machine_code(triton, forward_kernel, geometry(16, 12, 2, 48, precision), tmp_path / "forward.cubin")
        assert used["spilled"] == 0
        assert used["shared"] * inner_triton.FORWARD_WARPS <= SHARED_BYTES
        if precision == "tf32":
            assert used["registers"] * 32 * inner_triton.FORWARD_WARPS <= NUM_REGISTERS


@pytest.mark.slow
def test_what_the_backward_kernel_spills_stays_in_the_first_cache(triton: Any, tmp_path: Path) -> None:
    from pipeline.models.students.fused.triton_backward import backward_kernel

    used = machine_code(triton, backward_kernel, geometry(16, 12, 2, 48, "tf32"), tmp_path / "backward.cubin")
    warps = inner_triton.BACKWARD_WARPS
    assert used["shared"] * warps <= SHARED_BYTES
    assert used["registers"] * 32 * warps <= NUM_REGISTERS
    assert used["shared"] * warps + used["spilled"] * 32 * warps <= SHARED_AND_L1_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize(
    ("num_pixels", "width", "num_heads", "hidden"),
    [(16, 12, 2, 48), (4, 12, 2, 48), (16, 16, 2, 64), (16, 24, 4, 96), (49, 12, 2, 48), (64, 31, 1, 124)],
)
def test_every_geometry_compiles(
    num_pixels: int, width: int, num_heads: int, hidden: int, precision: str, triton: Any, tmp_path: Path
) -> None:
    from pipeline.models.students.fused.triton_backward import backward_kernel
    from pipeline.models.students.fused.triton_forward import forward_kernel

    of = geometry(num_pixels, width, num_heads, hidden, precision)
    for kernel in (forward_kernel, backward_kernel):
        assert machine_code(triton, kernel, of, tmp_path / "kernel.cubin")["shared"] <= SHARED_BYTES


GPU_CASES = [
    (16_384, 16, 12, 2),
    (4_096, 16, 12, 2),
    (3, 16, 12, 2),
    (1_001, 4, 12, 2),
    (1_001, 16, 16, 2),
    (515, 16, 24, 4),
    (129, 49, 12, 2),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("num_patches", "num_pixels", "width", "num_heads"), GPU_CASES)
def test_on_a_gpu_it_is_the_block_of_modules(num_patches: int, num_pixels: int, width: int, num_heads: int) -> None:
    differences = errors(case(num_patches, num_pixels, width, num_heads, device="cuda"), inner_block)
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.gpu
@pytest.mark.parametrize(("num_patches", "num_pixels", "width", "num_heads"), GPU_CASES)
def test_under_autocast_it_is_nearer_than_the_modules(
    num_patches: int, num_pixels: int, width: int, num_heads: int
) -> None:
    drawn = case(num_patches, num_pixels, width, num_heads, device="cuda")
    exact = outcome(drawn, drawn.plain)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        fused, plain = outcome(drawn, inner_block), outcome(drawn, drawn.plain)
    for name, value in exact.items():
        scale = value.norm()
        assert (fused[name] - value).norm() < (2e-2 if "gradient" in name else 5e-3) * scale, name
    for name in ("refined", "normed"):
        assert (fused[name] - exact[name]).norm() < (plain[name] - exact[name]).norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_the_same_input_gives_the_same_bits(autocast: bool) -> None:
    drawn = case(16_384, 16, 12, 2, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        one, other = outcome(drawn, inner_block), outcome(drawn, inner_block)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"pixel_width": 24, "pixel_heads": 4}, {"patch_size": 16}, {"pixel_size": 4}])
def test_the_guard_lets_it_through_on_a_gpu(settings: dict[str, int], precision: str) -> None:
    torch.manual_seed(0)
    student, device = build_student("titn", num_classes=3, depth=1, **settings), torch.device("cuda")
    block, number = student.blocks[0], inner_triton.num_checked(device, *student.blocks[0].inner_geometry)
    compared = guard.compare_inner(inner_block, block, device, precision=precision, training=True, num_patches=number)
    assert all(errors.are_alike for errors in compared.values()), compared
    assert use_inner_block(student, "fused", device, precision=precision) == "triton"


@pytest.mark.gpu
def test_torch_compile_takes_it_in_one_graph() -> None:
    drawn = case(1_001, 16, 12, 2, device="cuda")
    compiled = torch.compile(inner_block, fullgraph=True)
    eager, fused = outcome(drawn, inner_block), outcome(drawn, compiled)
    assert all(torch.equal(eager[name], fused[name]) for name in eager)


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
    drawn = case(1_001, 16, 12, 2, device="cuda")
    pixels = drawn.pixels.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        outputs = inner_block(pixels, drawn.weights, 2)
        return *outputs, *torch.autograd.grad(outputs, (pixels, *drawn.weights), drawn.gradients)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        pixels.copy_(drawn.pixels.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    expected = outcome(drawn._replace(pixels=drawn.pixels.flip(0)), inner_block)
    assert all(torch.equal(one, other) for one, other in zip(captured, expected.values(), strict=True))
