"""Batches on a Ray cluster: two nodes on this machine, one of which is killed in the middle."""

import sys

import pytest
import tiny as pipelines

from attnctl.app import recipe
from attnctl.app.batch import folder, running
from attnctl.app.command import UsageError

PROMPT = "a cat and a dog"


def pictures(out):
    return {path.name: recipe.read(path)[1].pixels for path in out.glob("*-????????????.png")}


def test_ray_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match='--ray needs Ray: pip install "attnctl'):
        list(running.run([{"prompt": PROMPT}], tmp_path, ray="auto"))


@pytest.fixture
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield found
    found.shutdown()


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_draws_what_one_process_draws(tmp_path, cluster):
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    pipelines.sd1().save_pretrained(tmp_path / "tiny")
    controls = ["none", "segregation(cat, dog)", "excitation(lion)"]
    fixed = {"prompt": PROMPT, "steps": 2, "model": str(tmp_path / "tiny")}
    rows = [fixed | {"product": {"seed": list(range(12)), "controls": controls[:2]}}, fixed | {"controls": controls[2]}]
    results, settings = [], {"group": 2, "scores": ["judge"]}
    for result in running.run(rows, tmp_path / "cluster", ray=cluster.address, **settings):
        results.append(result)
        if len(results) == 6:
            cluster.remove_node(second, allow_graceful=False)
    assert sorted(result.drawn for result in results) == [False] + [True] * 24
    (wrong,) = [result for result in results if result.error]
    assert "'lion' is not in the prompt" in wrong.error and list(folder.failures(tmp_path / "cluster")) == [wrong.key]
    assert len((tmp_path / "cluster" / "scores.jsonl").read_text().splitlines()) == 24
    list(running.run(rows, tmp_path / "one", threads=1, **settings))
    assert pictures(tmp_path / "cluster") == pictures(tmp_path / "one")
    assert not any(result.drawn for result in running.run(rows, tmp_path / "cluster", ray=cluster.address, **settings))


def test_no_cluster_is_one_line(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match="--ray 127.0.0.1:1: nobody answers there"):
        list(running.run([{"prompt": PROMPT}], tmp_path, ray="127.0.0.1:1"))
