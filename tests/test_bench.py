"""`ebmfast bench`: every case is right before it is timed, a peer that is not right gets no time, results are kept."""

import json
import os

import pytest
import torch

from ebmfast import cli
from ebmfast.benchmark import peers, quick
from ebmfast.benchmark.timing import Variant, compare


def few():
    case = quick._networks("small AND", 2, 8, 16, 3)
    yield case
    yield quick._networks("small OR", 2, 8, 16, 3, either=True)


def test_variants_take_turns_after_a_check():
    order = []

    def variant(name):
        return Variant(name, lambda: order.append(name), lambda: order.append(f"check {name}"))

    found = compare([variant("a"), variant("b")], rounds=2)
    assert order == ["check a", "a", "check b", "b", "a", "b", "a", "b"] and set(found) == {"a", "b"}
    with pytest.raises(AssertionError):
        def wrong():
            raise AssertionError

        compare([Variant("c", lambda: None, wrong)])


def test_the_table_is_printed_and_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(quick, "cases", few)
    out = tmp_path / "a" / "quick.jsonl"
    assert cli.main(["bench", "--seconds", "0.05", "--threads", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "small AND" in text and "eager" in text and "ebmfast" in text and "1 thread(s)" in text
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["small AND", "small OR"]
    for line in lines:
        assert line["threads"] == 1 and line["device"] and not line["refused"]
        assert set(line["seconds"]) >= {"ebmfast", "eager"} and all(t["median"] > 0 for t in line["seconds"].values())
    assert cli.main(["bench", "--threads", "0"]) == 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are bound on Linux")
def test_threads_bind_everybody_and_are_given_back(threads):
    cores, before = os.sched_getaffinity(0), torch.get_num_threads()
    with quick._threads(1):
        assert len(os.sched_getaffinity(0)) == 1 and torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == cores and torch.get_num_threads() == before


def test_every_case_is_right():
    """Also those that take long, at a few chains and steps, against every peer that is installed."""
    for case in quick.cases():
        case.x, case.steps = case.x[:4], 2
        for make in quick.makers(case, [p for p in quick.installed(False) if p != "jax"]).values():
            variant = make()
            variant.check()
            variant.run()


def test_a_wrong_peer_gets_no_time():
    case = next(few())
    case.energy = lambda x: x.square().sum(1)
    line = quick.measure(case, ["eager"], 0.01)
    assert set(line["seconds"]) == {"ebmfast"} and "AssertionError" in line["refused"]["eager"]
    assert "refused" in quick.table([line], ["eager"])


def test_no_time_at_all_where_ebmfast_is_wrong(monkeypatch):
    case = next(few())
    monkeypatch.setattr(torch.testing, "assert_close", lambda *a, **k: (_ for _ in ()).throw(AssertionError("differ")))
    with pytest.raises(AssertionError, match="differ"):
        quick.measure(case, [], 0.01)


def test_peers_must_land_where_we_do():
    case = next(few())
    with pytest.raises(AssertionError):
        peers.lands_with_ours(lambda x, n: x + 1e-3, case.expression, case.x)
