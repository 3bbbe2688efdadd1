"""The verification itself: that it passes on a torch that computes, fails on one that does not, and survives one that crashes."""

import argparse
import json
import os
import sys

import pytest
import torch

from groundup.env import verify
from groundup.env.layout import width

posix = pytest.mark.skipif(os.name == "nt", reason="pretends a Python by a shell script")


def test_cpu_computes():
    verdict = verify.verify("cpu")
    assert verdict["ok"] and verdict["error"] is None
    assert verdict["torch"] == torch.__version__
    assert 0 < verdict["matmul_error"] < 1e-3 and 0 < verdict["gradient_error"] < 1e-3


def twice(monkeypatch):
    """A torch whose float32 product is wrong; the float64 reference stays right."""
    good = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: good(left, right) * (2 if left.dtype == torch.float32 else 1))


def test_wrong_result_is_found(monkeypatch):
    twice(monkeypatch)
    verdict = verify.verify("cpu")
    assert not verdict["ok"] and "wrong result" in verdict["error"]


def test_missing_device_and_package_fail_with_one_line_of_json(capsys):
    if not torch.cuda.is_available():
        assert verify.main(["--device", "cuda"]) == 1
        assert json.loads(capsys.readouterr().out)["error"]
    assert verify.main(["--device", "cpu", "--package", "no_such_package"]) == 1
    assert "no_such_package" in json.loads(capsys.readouterr().out)["error"]
    assert verify.main(["--device", "cpu", "--package", "json"]) == 0


def test_companion_that_does_not_fit_fails(monkeypatch, capsys):
    def broken(device):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(verify, "companions", broken)
    assert verify.main(["--device", "cpu", "--companions"]) == 1
    assert "torchvision::nms" in json.loads(capsys.readouterr().out)["error"]


# --- the full verification -------------------------------------------------------------------------------------------------------

QUICK = ("matmul", "autograd", "convolution", "bf16", "fp16", "sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "bandwidth")


def check(name):
    return next(function for key, _, _, function in verify.CHECKS if key == name)


@pytest.mark.parametrize("name", QUICK)
def test_each_check_on_this_cpu(name):
    try:
        measured, expected, status = check(name)("cpu")
    except verify.Skip as skip:
        assert skip.reason["en"] and skip.reason["zh"]
        assert name in ("sdpa_efficient", "sdpa_cudnn", "bandwidth", "bf16", "fp16")
    else:
        assert status == "ok" and measured and expected


def test_checks_see_wrong_numbers(monkeypatch):
    twice(monkeypatch)
    assert check("matmul")("cpu")[2] == "failed"
    monkeypatch.undo()
    good = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, w, **k: good(x, w, **k) * (1.01 if x.dtype == torch.float32 else 1))
    assert check("convolution")("cpu")[2] == "failed"
    monkeypatch.undo()

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context, values):
            return values.tanh()

        @staticmethod
        def backward(context, gradient):
            return gradient

    monkeypatch.setattr(torch, "tanh", Wrong.apply)
    assert check("autograd")("cpu")[2] == "failed"
    assert verify._near(float("nan"), 1.0)[2] == "failed"


def test_a_check_that_raises_is_a_failed_row(monkeypatch):
    def broken(device):
        raise RuntimeError("no kernel image is available\nsecond line")

    monkeypatch.setattr(verify, "CHECKS", (("one", "first", "第一项", broken),))
    announced, row = verify.full("cpu")
    assert announced == {"check": "one"}
    assert row["status"] == "failed" and row["reason"]["en"] == "RuntimeError: no kernel image is available"


def test_compile_without_a_compiler_is_skipped_with_the_way_to_get_one(monkeypatch):
    monkeypatch.setattr(verify.shutil, "which", lambda name: None)
    with pytest.raises(verify.Skip) as skip:
        verify.compiled("cpu")
    assert "no C++ compiler: " in skip.value.reason["en"] and "没有 C++ 编译器" in skip.value.reason["zh"]


def test_two_processes_add_up():
    measured, _, status = verify.all_reduce("cpu")
    assert status == "ok" and measured == "gloo 3000.0/3000.0"


CPUINFO = """processor\t: 0
model name\t: Some CPU
cpu MHz\t\t: 2500.000
siblings\t: 8
cpu cores\t: 4
flags\t\t: fpu sse2 avx avx2 fma {more}

processor\t: 1
cpu MHz\t\t: 3000.000
"""


@pytest.mark.parametrize(
    ("more", "mhz", "threads", "tflops"),
    [
        ("", 4000.0, 8, 4 * 4e9 * 8 * 4 / 1e12),  # eight threads on four cores
        ("avx512f", 4000.0, 8, 4 * 4e9 * 16 * 4 / 1e12),
        ("", None, 8, 4 * 3e9 * 8 * 4 / 1e12),  # the fastest of the present clocks
    ],
)
def test_what_a_cpu_should_reach(more, mhz, threads, tflops):
    assert verify.parse_cpu_peak(CPUINFO.format(more=more), mhz, threads) == pytest.approx(tflops)
    assert verify.parse_cpu_peak("processor : 0\n", None, 1) is None


def test_peaks_are_found_by_name():
    def peak(name):
        return next(peaks for pattern, peaks in verify.PEAKS if verify.re.search(pattern, name))

    assert peak("NVIDIA H100 80GB HBM3")[2] == 989.4 and peak("NVIDIA H100 PCIe")[2] == 756.0
    assert peak("NVIDIA GeForce RTX 4090")[0] == 82.6 and peak("NVIDIA L40S")[2] == 362.1 and peak("NVIDIA L4")[0] == 30.3
    for _, (fp32, tf32, bf16) in verify.PEAKS:
        assert (tf32 is None) == (bf16 is None) and (bf16 is None or fp32 <= tf32 < bf16)


@pytest.mark.slow
def test_everything_on_the_cpu_through_the_verb(capsys):
    status, out = run(capsys, "--full", "--device", "cpu", "--json")
    verdict = json.loads(out)
    rows = {row["name"]: row for row in verdict["checks"]}
    assert status == 0 and verdict["ok"] and [row["status"] for row in rows.values()].count("failed") == 0
    assert list(rows) == [name for name, *_ in verify.CHECKS]
    assert rows["compile"]["status"] in ("ok", "skipped") and "TFLOP/s" in rows["fp32_speed"]["measured"]


# --- the verb --------------------------------------------------------------------------------------------------------------------


def run(capsys, *words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--lang")
    verify.configure(parser)
    status = verify.run(parser.parse_args(words))
    return status, capsys.readouterr().out


def pretended(tmp_path, script):
    """A Python that does what a shell script says."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    return str(program)


def test_the_verb_judges_another_python(capsys):
    status, out = run(capsys, "--device", "cpu", "--json", "--python", sys.executable)
    assert status == 0 and json.loads(out)["torch"] == torch.__version__
    status, out = run(capsys, "--device", "cpu", "--lang", "zh")
    assert status == 0 and "计算正确" in out
    status, out = run(capsys, "--python", "/no/such/python", "--json")
    assert status == 2 and json.loads(out)["error"]


ROW = {"name": "matmul", "title": {"en": "matrix product", "zh": "矩阵乘法"}, "status": "ok", "measured": "1e-7", "expected": "< 1e-4",
       "reason": None, "seconds": 0.1}  # fmt: skip


@posix
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_torch_that_crashes_is_reported_with_the_check_it_crashed_in(capsys, tmp_path, language):
    lines = [json.dumps({"check": "matmul"}), json.dumps(ROW), json.dumps({"check": "sdpa_flash"}), "Fatal: bad instruction"]
    (tmp_path / "said").write_text("\n".join(lines) + "\n")
    python = pretended(tmp_path, f"cat '{tmp_path / 'said'}'; kill -SEGV $$\n")
    status, out = run(capsys, "--full", "--python", python, "--lang", language)
    assert status == 1 and "signal 11, SIGSEGV" in out and "'sdpa_flash'" in out and "Fatal: bad instruction" in out
    assert "env doctor" in out and "1e-7" in out  # the rows that came before stay
    verdict = verify.judge(python, "cpu", True, 60.0)
    assert not verdict["ok"] and [row["name"] for row in verdict["checks"]] == ["matmul"]


@posix
def test_a_torch_that_hangs_is_ended(tmp_path):
    verdict = verify.judge(pretended(tmp_path, "exec sleep 60\n"), "cpu", False, 0.5)
    assert not verdict["ok"] and "did not end within" in verdict["error"]


@posix
def test_a_python_without_torch_and_noise_on_the_output(capsys, tmp_path):
    answer = {
        "ok": False,
        "device": "auto",
        "device_name": None,
        "torch": None,
        "error": "ModuleNotFoundError: No module named 'torch'",
        "seconds": 0.1,
    }
    (tmp_path / "said").write_text("some warning\n[1, 2]\n" + json.dumps(answer) + "\n")
    status, out = run(capsys, "--python", pretended(tmp_path, f"cat '{tmp_path / 'said'}'; exit 1\n"), "--lang", "en")
    assert status == 1 and "No module named 'torch'" in out


@posix
@pytest.mark.parametrize("language", ["en", "zh"])
def test_table_is_eighty_columns_wide_and_names_what_is_slow(capsys, tmp_path, language):
    long = {"en": "a reason " * 20, "zh": "很长的理由" * 15}
    rows = [ROW, {**ROW, "status": "slow"}, {**ROW, "status": "skipped", "measured": None, "expected": None, "reason": long}]
    answer = {"ok": True, "device": "cpu", "device_name": None, "torch": "2.13.0", "error": None, "seconds": 1.0, "checks": rows}
    (tmp_path / "said").write_text("\n".join(json.dumps(row) for row in [*rows, answer]) + "\n")
    status, out = run(capsys, "--full", "--python", pretended(tmp_path, f"cat '{tmp_path / 'said'}'\n"), "--lang", language)
    assert status == 0 and all(width(line) <= 80 for line in out.splitlines())
    assert ("Slower than" in out) == (language == "en") and ("应有的速度" in out) == (language == "zh")
