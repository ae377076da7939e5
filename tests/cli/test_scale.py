"""Plans of blocks: the same images whoever draws them; failures listed; no halves on the disk."""

import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import guidekit
from guidekit.cli.scale.block_plan import BlockPlan, read_block_plan
from guidekit.cli.scale.store import Store
from guidekit.cli.scale.worker import Worker, drawn_by_someone
from guidekit.system.locks import held, holder
from plans import PROMPT, contents, run, write_plan


class Counting:
    """Draws bytes that say which image they are, and fails at some blocks."""

    made_by = {"torch": "1"}

    def __init__(self, plan, broken=()):
        self.plan, self.broken, self.calls = plan, set(broken), []

    def draw(self, number):
        self.calls.append(number)
        if number in self.broken:
            raise ValueError(f"block {number} is broken")
        return [(f"{seed:08d}.png", str(seed).encode()) for seed in self.plan.seeds(number)]


def made(folder, **values):
    """A store and what draws its plan."""
    plan = BlockPlan(**{"sample": {"seeds": [5]}, "count": 10, "block": 4} | values)
    return Store.make(folder, plan), Counting(plan)


def test_blocks_are_fixed_ranges_of_seeds():
    plan = BlockPlan(sample={"seeds": [5]}, count=10, block=4)
    assert [list(plan.seeds(n)) for n in plan.blocks] == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14]]


def test_conditions_are_dealt_to_images_in_turn():
    plan = BlockPlan(sample={}, count=7, each=2, conditions=({"label": 4}, {"label": 9}))
    found = [plan.condition(seed, guidekit.Condition()).label for seed in range(7)]
    assert found == [4, 4, 9, 9, 4, 4, 9]


def test_a_condition_has_what_its_entry_leaves_out_from_the_plan():
    base = guidekit.Condition("a red circle", "blur")
    entry = {"segments": [{"phrase": "red circle", "box": [0, 0, 0.5, 1]}]}
    plan = BlockPlan(sample={}, count=2, conditions=(entry, {"prompt": "x", "negative": ""}))
    first, second = plan.condition(0, base), plan.condition(1, base)
    assert (first.prompt, first.negative) == (base.prompt, base.negative)
    assert first.segments[0].phrase == "red circle"
    assert (second.prompt, second.negative, second.segments) == ("x", "", ())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "give `count`"),
        ({"count": 0}, "from 1, not 0"),
        ({"count": True}, "from 1, not True"),
        ({"count": 4, "calls": "both"}, "split or batched"),
        ({"count": 4, "form": "zip"}, "folders or tars"),
        ({"count": 4, "blocks": 2}, "keys format, sample"),
        ({"count": 4, "format": 7}, "format 1 is read, not 7"),
        ({"count": 4, "sample": {"batch": 3}}, "`sample` may have"),
        ({"count": 4, "sample": {"seeds": [0, 1]}}, "first image's alone"),
        ({"conditions": [3]}, "condition 0 is a prompt"),
        ({"conditions": [{"promt": "x"}]}, "condition 0 is a prompt"),
        ({"conditions": "../x.txt"}, "leads out of"),
        ({"conditions": "none.txt"}, "no such file"),
        ({"count": 4, "folder": 3}, "must be a path"),
        ({"count": 8, "block": 3, "sample": {"particles": 2}}, "multiples of its 2 particles"),
        ({"count": 8, "sample": {"particles": 0}}, "from 1, not 0"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path, table, message):
    (tmp_path / "plan.json").write_text(json.dumps(table))
    with pytest.raises(guidekit.GuidekitError, match=message):
        read_block_plan(tmp_path)


def test_conditions_come_from_lines_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "b.jsonl").write_text('{"label": 3}\n"a cow"\n')
    for name, entries in (
        ("a.txt", [{"prompt": "a cat"}, {"prompt": "a dog"}]),
        ("b.jsonl", [{"label": 3}, {"prompt": "a cow"}]),
    ):
        (tmp_path / "plan.json").write_text(json.dumps({"conditions": name, "each": 3}))
        plan = read_block_plan(tmp_path)
        assert (list(plan.conditions), plan.count) == (entries, 6)


def test_a_lock_is_anothers_until_it_is_given_back(tmp_path):
    path = tmp_path / "lock"
    with held(path) as first, held(path) as second:
        assert first
        assert not second
        assert holder(path).endswith(f":{os.getpid()}")
    assert not path.exists()
    with held(path) as again:
        assert again


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import os, sys; from pathlib import Path; from guidekit.system.locks import held\n"
        "with held(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=False)
    assert path.exists()
    assert holder(path) is None
    with held(path) as own:
        assert own


def test_what_killed_processes_left_goes_when_the_plan_is_complete(tmp_path):
    """Of blocks, of the plan itself and of its files; what a living process writes stays."""
    store, drawer = made(tmp_path)
    Worker(store, drawer).run()
    state, host = store.folder / "state", socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (state / "parts" / f"files.{host}-{dead.pid}").mkdir()
    (state / "parts" / f"plan.json.{host}-{dead.pid}").write_text("{")
    (state / "parts" / f"00001.other-{dead.pid}").write_text("")
    (state / "locks" / "00001.lock").write_text(json.dumps({"host": host, "pid": dead.pid}))
    living = state / "parts" / f"manifest.json.{host}-{os.getpid()}"
    living.write_text("{")
    store.tidy()
    assert list((state / "parts").iterdir()) == [living]
    assert not list((state / "locks").iterdir())


def test_shares_are_disjoint_and_whole(tmp_path):
    store, drawer = made(tmp_path, count=40)
    for share in (1, 2, 3):
        Worker(store, drawer, (share, 3)).run()
    assert sorted(drawer.calls) == list(store.plan.blocks)
    with pytest.raises(guidekit.GuidekitError, match="1/3 to 3/3, not 4/3"):
        Worker(store, drawer, (4, 3))


def test_a_broken_block_is_listed_and_tried_again_by_the_next_call(tmp_path):
    store, drawer = made(tmp_path)
    drawer.broken = {1}
    worker = Worker(store, drawer)
    worker.run()
    assert drawer.calls == [0, 1, 2]
    assert list(worker.failed) == [1]
    assert worker.left == 1
    Worker(store, drawer).run()
    assert drawer.calls == [0, 1, 2, 1]
    (failure,) = store.manifest()["failures"]
    told = {"block": 1, "seeds": [9, 12], "tries": 2, "error": "ValueError: block 1 is broken"}
    assert failure == told
    drawer.broken = set()
    Worker(store, drawer).run()
    assert store.manifest()["complete"]
    assert not store.manifest()["failures"]


def test_what_a_peer_failed_at_meanwhile_is_not_tried_again(tmp_path):
    store, drawer = made(tmp_path)
    late = Worker(store, drawer)
    drawer.broken = {0}
    Worker(store, drawer).run()
    late.run()
    assert drawer.calls == [0, 1, 2]


def test_a_plan_that_cannot_work_ends_early_and_goes_past_its_failures_later(tmp_path):
    store, drawer = made(tmp_path, count=40)
    drawer.broken = set(range(6))
    with pytest.raises(guidekit.GuidekitError, match="5 blocks failed one after the other"):
        Worker(store, drawer).run()
    drawer.calls.clear()
    Worker(store, drawer).run()
    assert drawer.calls == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_a_block_that_two_drew_is_there_once(tmp_path):
    for form in ("folders", "tars"):
        store, drawer = made(tmp_path / form, form=form)
        for _ in range(2):
            store.publish(0, drawer.draw(0), {})
        assert len(contents(tmp_path / form)) == (4 if form == "folders" else 1)
        assert not list((tmp_path / form / "state/parts").iterdir())


def test_a_single_block_is_drawn_under_its_lock_or_awaited(tmp_path, monkeypatch):
    monkeypatch.setattr("guidekit.cli.scale.worker.WAIT", 0.01)
    store, drawer = made(tmp_path)
    half = tmp_path / "state" / "parts" / f"{store.place(0).name}.gone-1"
    half.mkdir()
    assert drawn_by_someone(store, drawer, 0)
    assert not half.exists()
    assert store.done(0)
    peer = Counting(store.plan)
    with ThreadPoolExecutor() as pool:
        with held(store.state("locks", 1)):
            waits = pool.submit(drawn_by_someone, store, drawer, 1)
            time.sleep(0.1)
            assert not waits.done()
            store.publish(1, peer.draw(1), {})
        assert waits.result()
    assert drawer.calls == [0]
    drawer.broken = {2}
    assert not drawn_by_someone(store, drawer, 2)
    assert store.tries(2) == 1
    assert drawer.calls == [0, 2]


def test_a_folder_has_one_plan(tmp_path):
    made(tmp_path)
    made(tmp_path)
    with pytest.raises(guidekit.GuidekitError, match="holds another plan"):
        made(tmp_path, count=11)


def test_count_draws_what_one_batch_of_these_seeds_is(model, tmp_path, monkeypatch):
    """In folders and in tars, also with a mask, a plugin and another working directory later."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.pad(np.full((4, 4), 255, np.uint8), 4)).save("mask.png")
    words = ["sample", "--model", model, "--prompt", PROMPT, "--steps", 2, "--segment"]
    words += ["red circle=mask.png", "--plugin", "zest", "--count", 3, "--block", 2, "--quiet"]
    for form in ("folders", "tars"):
        done = run(*words, "--form", form, "--seeds", 7, "--out", form)
        assert done.exit_code == 0, done.stderr
    drawn = guidekit.Sampling(
        guidekit.load(str(model)),
        guidekit.Condition(PROMPT, segments=guidekit.Segment("red circle", "mask.png")),
        "zest",
        seeds=(7, 8),
        steps=2,
        calls={"*": "split"},
    ).finish()
    expected = (drawn.images.clamp(0, 1).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    folder, tar = tmp_path / "folders/00000", tmp_path / "tars/00000.tar"
    for seed, pixels in zip((7, 8), expected, strict=True):
        assert np.array_equal(Image.open(folder / f"{seed:08d}.png"), pixels)
    with tarfile.open(tar) as opened:
        members = {member.name: opened.extractfile(member).read() for member in opened}
    both = [name for name in members if not name.endswith(".json")]
    assert len(members) == 6
    assert both
    assert all(members[name] == (folder / name).read_bytes() for name in both)  # plans differ
    assert (folder / "00000007.txt").read_text() == PROMPT
    energies = json.loads((folder / "00000007.json").read_text())["energy"]["zest"]
    assert energies[0] == pytest.approx(drawn.account.rows[0]["energy"][0], rel=1e-5)
    kept = contents(tmp_path / "folders")
    (tmp_path / "folders/00001").rename(tmp_path / "gone")
    monkeypatch.chdir("/")
    again = run("sample", "--plan", tmp_path / "folders", "--quiet")
    assert again.exit_code == 0, again.stderr
    assert contents(tmp_path / "folders") == kept


def test_a_poisoned_condition_is_listed_and_the_rest_goes_on(model, tmp_path):
    place = {"box": [0, 0, 1, 1]}
    bad, later = {"segments": [{"phrase": "green dog"} | place]}, {"layout": "later.json"}
    plan = write_plan(
        tmp_path / "p.json",
        model,
        conditions=[{}, {}, bad, {}, {}, later, {}],
        segment=[{"phrase": "red circle"} | place],
        plugin={"zest": {}},
        sample={"steps": 2},
    )
    words = ("sample", "--plan", plan, "--out", tmp_path / "o")
    done = run(*words)
    assert done.exit_code == 2
    assert "2 of 4 blocks failed" in done.stderr
    assert "green dog" in done.stderr
    status = run("status", tmp_path / "o")
    assert status.exit_code == 3
    assert "failed   block 2, seeds 4-5, tries 1: GuidekitError: condition 5" in status.stdout
    assert {name.partition("/")[0] for name in contents(tmp_path / "o")} == {"00000", "00003"}
    layout = {"prompt": "a red circle", "segments": [{"phrase": "circle"} | place]}
    (tmp_path / "later.json").write_text(json.dumps(layout))
    assert run(*words).exit_code == 2
    told = json.loads(run("status", tmp_path / "o", "--json").stdout)
    assert [(row["block"], row["tries"]) for row in told["failures"]] == [(1, 2)]
    assert told["images"] == 5
    assert not told["complete"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--count", 4), "with --out"),
        (("--block", 4), "--block is for blocks"),
        (("--shard", "1/2"), "--shard is for blocks"),
        (("--count", 4, "--seeds", "0-3", "--out", "o"), "--seeds 0"),
        (("--count", 4, "--batch", 2, "--out", "o"), "--batch is not for --count"),
        (("--count", 4, "--compare", "--out", "o"), "--compare is not for --count"),
        (("--count", 4, "--shard", "0/2", "--out", "o", "--steps", 1), "1/2 to 2/2, not 0/2"),
        (("--count", 4, "--shard", "2", "--out", "o", "--steps", 1), "such as 2/8"),
        (("--plan", "nope.json", "--out", "o"), "no such file"),
        (("--plan", "nope.json", "--cfg", 2), "--cfg: a plan says it all"),
    ],
)
def test_what_does_not_go_together_is_refused(model, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    model = () if "--plan" in words else ("--model", model)
    done = run("sample", *model, *words)
    assert done.exit_code == 2, done.stderr
    assert message in done.stderr, done.stderr


def test_particles_of_a_group_lie_in_one_block(model, tmp_path):
    plan = write_plan(tmp_path / "p.json", model, count=4, sample={"particles": 2})
    assert run("sample", "--plan", plan, "--out", tmp_path / "o").exit_code == 0
    assert len(contents(tmp_path / "o")) == 12


def test_a_plan_begun_with_other_values_is_refused(model, tmp_path):
    plan = write_plan(tmp_path / "p.json", model, count=2)
    assert run("sample", "--plan", plan, "--out", tmp_path / "o").exit_code == 0
    record = json.loads((tmp_path / "o/run.json").read_text())
    record["sample"]["cfg"] = 3.5
    (tmp_path / "o/run.json").write_text(json.dumps(record))
    done = run("sample", "--plan", tmp_path / "o")
    assert done.exit_code == 2
    assert "other values of [sample]" in done.stderr


@pytest.mark.full
def test_threads_are_the_plans(model, tmp_path):
    before = torch.get_num_threads()
    plan = write_plan(tmp_path / "p.json", model, count=1, threads=2)
    try:
        assert run("sample", "--plan", plan, "--out", tmp_path / "o").exit_code == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
