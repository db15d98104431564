"""The kernels for a GPU, run by Triton's interpreter on a CPU, against what a CPU computes without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

IN_THE_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(IN_THE_INTERPRETER, reason="this is the process that the test below starts")
def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton reads the setting when it is imported."""
    paths = [Path(__file__).parent, *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed, 4 skipped" in done.stdout


@pytest.mark.skipif(IN_THE_INTERPRETER, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_kernels_compile_for_a_gpu(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to machine code: the interpreter takes what the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from meansparse_cli.operator import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointer, flags = f"*{dtype}", {"KEEP": True, "PER_ROW": True, "BLOCK": 1024}
    band = {"x": pointer, "band": (pointer, "*fp32"), "out": pointer, "kept": "*u8", "sizes": ("i32",) * 4}
    sums = {"x": pointer, "shift": "*fp64", "sums": "*fp64", "sizes": ("i32",) * 3, "strides": ("i32",) * 3}
    blocks = {"SPLITS": 256, "BLOCK": 1024, "BLOCK_C": 1}
    for kernel, signature, constants in ((kernels._band, band, flags), (kernels._sums, sums, blocks)):
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        target = GPUTarget("cuda", 90, 32)
        assert triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["cubin"]


interpreted = pytest.mark.skipif(not IN_THE_INTERPRETER, reason="run by the test above, in the interpreter")
if IN_THE_INTERPRETER:
    import torch

    from meansparse_cli.operator import device, function, kernels, statistics
    from test_operator_function import RULES, defined, inputs

    assert device._kernels_work("cpu"), "the kernels' own check, which is made once"

    @interpreted
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("per_row", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("layout", ["channels-first", "channels-last", "tokens", "flat"])
    def test_the_operator(
        layout: str, dtype: torch.dtype, per_row: bool, rule: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, mean, threshold = inputs(layout, dtype, per_row)
        if layout in ("tokens", "flat"):
            x = x.contiguous()
        options = {"true": {}, "identity": {"straight_through": True}, "soft": {"soft_edge": torch.full_like(mean, 1)}}
        grad = torch.randn(x.shape).to(dtype)
        results = []
        calls = []
        own = kernels.replaced
        monkeypatch.setattr(kernels, "replaced", lambda *args: calls.append(args) or own(*args))
        for where in ("cuda", "cpu"):  # without the kernel, then by it
            monkeypatch.setattr(device, "KERNELS_FOR", where)
            asked = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = function.mean_sparsify(asked, mean, threshold, **options[rule])  # type: ignore[arg-type]
            assert torch.equal(out, defined(x, mean, threshold)) and out.stride() == x.stride()
            results.append(torch.autograd.grad(out, asked, grad)[0])
        assert [len(args[0]) for args in calls if len(args[0]) > 1] == [len(x)], "once by the kernel"
        assert torch.equal(*results)

    @interpreted
    def test_nan_stays_and_a_layout_that_does_not_fit_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(device, "KERNELS_FOR", "cpu")
        x, mean, threshold = inputs("channels-first", torch.float32, per_row=False)
        x[0, 0, 0, 0] = float("nan")
        assert function.mean_sparsify(x, mean, threshold)[0, 0, 0, 0].isnan()
        turned = x.transpose(2, 3)
        assert not kernels.fits(turned, mean, threshold)
        expected = defined(turned, mean, threshold)
        assert torch.equal(function.mean_sparsify(turned, mean, threshold).nan_to_num(), expected.nan_to_num())

    @interpreted
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("layout", ["channels-first", "channels-last", "tokens", "flat"])
    def test_the_sums(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "SPLITS", 3)
        x = (torch.randn(11, 37, 9, 13) + torch.arange(37).view(1, 37, 1, 1) * 50).to(dtype)
        axis = 1
        if layout == "channels-last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "tokens":
            x, axis = x.flatten(2).transpose(1, 2).contiguous(), 2
        elif layout == "flat":
            x = x[:, :, 0, 0].contiguous()
        without = statistics.of_batch(x, axis, 37)
        monkeypatch.setattr(device, "KERNELS_FOR", "cpu")
        by_kernel = statistics.of_batch(x, axis, 37)
        assert by_kernel.count == without.count
        torch.testing.assert_close(by_kernel.mean, without.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(by_kernel.spread, without.spread, rtol=1e-11, atol=1e-11)

    @interpreted
    def test_a_gpu_that_triton_cannot_serve_goes_without(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fails(*_: object) -> None:
            raise RuntimeError("Failed to find C compiler")

        device._kernels_work.cache_clear()
        monkeypatch.setattr(device, "KERNELS_FOR", "cpu")
        monkeypatch.setattr(kernels, "replaced", fails)
        x, mean, threshold = inputs("channels-first", torch.float32, per_row=False)
        for _ in range(2):
            assert torch.equal(function.mean_sparsify(x, mean, threshold), defined(x, mean, threshold))
        device._kernels_work.cache_clear()
        assert caplog.text.count("Triton makes no kernels on cpu (RuntimeError)") == 1
