"""The verification itself: that it passes on a torch that computes and fails on one that does not."""

import json

import torch

from groundup.env import verify


def test_cpu_computes():
    verdict = verify.verify("cpu")
    assert verdict["ok"] and verdict["error"] is None
    assert verdict["torch"] == torch.__version__
    assert 0 < verdict["matmul_error"] < 1e-3 and 0 < verdict["gradient_error"] < 1e-3


def test_wrong_result_is_found(monkeypatch):
    good = torch.Tensor.__matmul__

    def broken(left, right):
        # Only the product under test, which is in float32; the float64 reference stays right.
        return good(left, right) * (2 if left.dtype == torch.float32 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    verdict = verify.verify("cpu")
    assert not verdict["ok"] and "wrong result" in verdict["error"]


def test_missing_device_and_package_fail_with_one_line_of_json(capsys):
    if not torch.cuda.is_available():
        assert verify.main(["--device", "cuda"]) == 1
        assert json.loads(capsys.readouterr().out)["error"]
    assert verify.main(["--device", "cpu", "--package", "no_such_package"]) == 1
    assert "no_such_package" in json.loads(capsys.readouterr().out)["error"]
    assert verify.main(["--device", "cpu", "--package", "json"]) == 0
