"""The doctor runs real checks: it fails when what it checks is broken."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch

from ebmfast import backends, chain, doctor, rng


def diagnose() -> tuple[int, str]:
    out = io.StringIO()
    return doctor.run(out), out.getvalue()


def test_healthy():
    code, text = diagnose()
    assert code == 0 and "all checks passed" in text
    for name in backends.NAMES:
        assert f"{name}: " in text


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "ebmfast"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "all checks passed" in done.stdout, done.stderr


def test_a_wrong_generator_is_noticed(monkeypatch):
    monkeypatch.setattr(rng, "_MULTIPLIERS", (0xD2511F53, 0xCD9E8D59))
    code, text = diagnose()
    assert (
        code == 1
        and "Philox known answers: FAILED" in text
        and "cpu: one step equals the reference: FAILED" in text
    )


def test_a_wrong_kernel_is_noticed(monkeypatch):
    plan = backends.CpuBackend._plan

    def off_by_one_step(self, x, **options):
        inner = plan(self, x, **options)
        return lambda gradients, weights, drift, noise, step: inner(
            gradients, weights, drift, noise, step + 1
        )

    monkeypatch.setattr(backends.CpuBackend, "_plan", off_by_one_step)
    code, text = diagnose()
    assert code == 1 and "cpu: one step equals the reference: FAILED: AssertionError" in text


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_crash_is_a_failure_not_an_exception(monkeypatch, name):
    def crash(*_, **__):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(
        {"reference": backends.ReferenceBackend, "cpu": backends.CpuBackend}[name], "_fill", crash
    )
    code, text = diagnose()
    assert code == 1 and f"{name}: known normals: FAILED: RuntimeError: no such instruction" in text


def test_a_wrong_chain_engine_is_noticed(monkeypatch):
    monkeypatch.setitem(chain.ACTIVATIONS, torch.nn.SiLU, chain.ACTIVATIONS[torch.nn.ReLU])
    code, text = diagnose()
    assert code == 1 and "cpu: the chain engine agrees with the reference: FAILED: AssertionError: states differ" in text
