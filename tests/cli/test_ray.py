"""Blocks as rows of Ray Data, on two workers of this machine."""

import json

import pytest

from plans import contents, run, write_plan

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster():
    """Ray with two workers; without its page, its statistics and its logs on the terminal."""
    ray.init(
        num_cpus=5, include_dashboard=False, log_to_driver=False, object_store_memory=2**28,
        runtime_env={"env_vars": {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()


def test_two_workers_draw_the_bytes_of_one_process(cluster, model, tmp_path):
    """And a job checkpoint skips what is done, but not what failed."""
    from guidekit import ray as guidekit_ray

    place = {"box": [0, 0, 1, 1]}
    layout = {"prompt": "a red circle", "segments": [{"phrase": "circle"} | place]}
    good = [{"prompt": "a red circle"}] * 7
    plan = write_plan(tmp_path / "p.json", model, conditions=[*good, {"layout": "later.json"}])
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = ray.data.checkpoint.CheckpointConfig(
        id_column="id", checkpoint_path=str(tmp_path / "done"), delete_checkpoint_on_success=False
    )
    try:
        for expected in ([0, 1, 2], [3]):
            out = tmp_path / f"rows-{expected[0]}"
            guidekit_ray.draw(plan, tmp_path / "ray", workers=2).write_parquet(str(out))
            context.checkpoint_config, kept = None, context.checkpoint_config
            rows = ray.data.read_parquet(str(out)).take_all()
            context.checkpoint_config = kept
            assert sorted(row["id"] for row in rows) == expected
            told = json.loads(run("status", tmp_path / "ray", "--json").stdout)
            assert told["complete"] == (expected == [3])
            (tmp_path / "later.json").write_text(json.dumps(layout))
    finally:
        context.checkpoint_config = None
    assert run("sample", "--plan", plan, "--out", tmp_path / "one").exit_code == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
