"""Data sets from a GPU: the chains of the CPU within rounding, the same bytes from workers. Not yet run on one."""

import pytest
import torch
from conftest import REQUIRED
from dataset_plans import contents, pictures, points

from ebmfast import backends

if backends.home("triton") == "cpu" or not (torch.cuda.is_available() or {"triton", "cuda"} & REQUIRED):
    pytest.skip("torch finds no CUDA device", allow_module_level=True)
pytest.importorskip("pydantic")
pytest.importorskip("pyarrow")

from ebmfast.generate import generate, resolve  # noqa: E402
from ebmfast.generate.maker import Maker  # noqa: E402


@pytest.mark.parametrize(("plan", "tolerance"), [(points(64), 1e-4), (pictures(8), 2e-2)])
def test_samples_are_those_of_the_cpu_within_rounding(plan, tolerance):
    here = Maker(resolve(plan)).sample(0)
    there = Maker(resolve(plan | {"run": plan["run"] | {"device": "cuda"}})).sample(0)
    assert there.ids.tolist() == here.ids.tolist() and there.x.device.type == "cpu"
    torch.testing.assert_close(there.x, here.x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(there.energy, here.energy, rtol=1e-2, atol=1e-2)


def test_workers_and_this_process_give_the_same_bytes(tmp_path):
    rule = {"classifier": "zoo:judge", "output": "present", "min": -5.0}
    plan = pictures(24, run={"batch_size": 4, "device": "cuda"}, filters=[rule])
    for name, workers in (("none", 0), ("two", 2)):
        assert generate(plan, tmp_path / name, workers=workers)
    assert contents(tmp_path / "none") == contents(tmp_path / "two")
