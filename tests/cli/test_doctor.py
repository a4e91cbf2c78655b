import json

import pytest
import torch
from torch import Tensor

from ternarize import ops
from ternarize.cli import FAILURE, OK, USAGE, doctor, main


@pytest.fixture(autouse=True)
def no_policy_and_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERNARIZE_BACKEND", "ARB_TERNARY_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


def test_doctor_reports_versions_choices_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == OK
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert report["policy"] == "auto"
    assert report["backends"]["torch"]["status"] == "PASS"
    assert {check["status"] for check in report["backends"].values()} <= {"PASS", "unavailable"}
    assert report["caches"]["inductor"]["free_bytes"] > 0
    if not torch.cuda.is_available():
        assert report["choices"]["inference"]["backend"] == "torch"
        assert "not tilelang: the tensors are on cpu" in report["choices"]["inference"]["reason"]


def test_doctor_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == OK
    out = capsys.readouterr().out
    for word in ("python", "tilelang", "inference graphs run", "PASS"):
        assert word in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU reports")
@pytest.mark.parametrize("backend", ["triton", "tilelang"])
def test_doctor_fails_if_a_forced_backend_cannot_run(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERNARIZE_BACKEND", backend)
    assert main(["doctor", "--json"]) == FAILURE
    report = json.loads(capsys.readouterr().out)
    assert report["choices"]["inference"]["backend"] is None
    assert f"{backend} cannot run linear" in report["choices"]["inference"]["reason"]
    assert report["backends"][backend]["status"] == "unavailable"


def test_doctor_fails_if_a_kernel_in_use_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong_triton(stem: str, backend: str) -> object:
        reference = getattr(torch.ops.ternarize, f"{stem}_torch").default

        def run(*args: object) -> list[Tensor]:
            # TileLang's op alone takes a list of status tensors, before the group size.
            given = (*args[:-2], args[-1]) if (stem, backend) == ("linear", "tilelang") else args
            result = reference(*given)
            if backend == "triton" and stem == "update_stage":
                stage: Tensor = args[6][0]  # type: ignore[index]
                stage[0, 0] += 1
            return result  # type: ignore[no-any-return]

        return run

    monkeypatch.setenv("TERNARIZE_BACKEND", "triton")
    monkeypatch.setattr("ternarize.backends.select.verify", lambda *_: (True, "said the test"))
    monkeypatch.setattr(doctor, "verify", lambda *_: (True, "said the test"))
    monkeypatch.setattr(ops, "lowered", wrong_triton)
    assert main(["doctor", "--json"]) == FAILURE
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["triton"] == {
        "status": "FAIL",
        "reason": "update_stage differs from the torch reference",
    }
    assert report["backends"]["tilelang"]["status"] == "PASS"


def test_doctor_reports_a_kernel_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stem: str, backend: str) -> object:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ops, "lowered", broken)
    check = doctor.check_backend("torch", torch.device("cpu"))
    assert check == {"status": "FAIL", "reason": "linear: RuntimeError: no compiler"}


def test_a_wrong_policy_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERNARIZE_BACKEND", "cuda")
    assert main(["doctor"]) == USAGE
    assert capsys.readouterr().err.count("\n") == 1
