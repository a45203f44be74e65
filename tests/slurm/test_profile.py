from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from recipes.errors import UserError
from recipes.loader import load
from recipes.slurm.profile import (
    CLUSTERS,
    FROZEN,
    Cluster,
    Container,
    Mail,
    Sweep,
    cluster_names,
    hours,
    load_cluster,
    load_frozen,
    slurm_time,
)
from recipes.yamlfile import read_yaml

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = "nodes: 1\ngpus_per_node: 1\ncpus_per_node: 1\ntime_limit: 1h\n"


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("smollm2-1.7b", "h100-32x8"), ("smollm2-360m", "h100-16x8"), ("smollm2-135m", "h100-8x8")],
)
def test_each_recipe_has_a_profile_of_its_gpus(recipe: str, name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.gpus == load(recipe, ROOT).parallelism.gpus
    assert cluster.gpus_per_node == 8 and cluster.env["NCCL_DEBUG"] == "WARN"


@pytest.mark.parametrize("name", ["h100-32x8", "h100-16x8", "h100-8x8", "single-node", "virtual"])
def test_profiles_load_and_name_no_site(name: str) -> None:
    assert name in cluster_names()
    cluster = load_cluster(name)
    assert cluster.name == name and cluster.account is None and cluster.shared is None and cluster.mail is None


def test_a_profile_extends_another_mapping_by_mapping(tmp_path: Path) -> None:
    path = written(
        tmp_path, "extends: h100-32x8\nnodes: 4\nenv: {NCCL_SOCKET_IFNAME: =ib0}\nevaluation: {at_once: 2}\n"
    )
    mine, base = load_cluster(path), load_cluster("h100-32x8")
    assert mine.env == {**base.env, "NCCL_SOCKET_IFNAME": "=ib0"}
    assert (mine.nodes, mine.evaluation.at_once, mine.evaluation.cpus) == (4, 2, base.evaluation.cpus)
    child = written(tmp_path, "extends: mine\nnodes: 5\n", "child.yaml")
    assert load_cluster(child).nodes == 5 and load_cluster(child).env == mine.env


def test_a_frozen_profile_stands_alone(tmp_path: Path) -> None:
    cluster = load_cluster(
        written(tmp_path, "extends: h100-8x8\nshared: $WORK/x\nsetup: [source .venv/bin/activate]\n")
    )
    cluster.freeze(tmp_path)
    assert load_frozen(tmp_path) == cluster
    assert "extends" not in read_yaml(tmp_path / FROZEN).data
    assert load_frozen(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: x\n", "the key 'partitoin' is unknown. Write 'partition'"),
        ("time_limit: 24:00\n", "24:00 is not decimal"),
        ("time_limit: \"24:00:00\"\n", "time_limit: found '24:00:00'. Write days, hours or minutes"),
        ("time_limit: 0h\n", "days, hours or minutes"),
        ("partition: a b\n", "without spaces or quotes"),
        ("partition: $(id)\n", "without spaces or quotes"),
        ("account: --wrap=x\n", "without spaces or quotes"),
        ("env: {1X: y}\n", "env.1X.[key]: found '1X'. Write a variable's name"),
        ("modules: cuda\n", "modules: found 'cuda'. Write a list, such as [one, two]"),
        ("mail: me@x\n", "mail: found 'me@x'. Write a mapping"),
        ("mail: {user: a b}\n", "mail.user: found 'a b'. Write it without spaces or quotes"),
        ("exclude: [a]\n", "exclude: found ['a']. Write one word"),
        ("evaluation: {at_onse: 2}\n", "evaluation.at_onse: the key 'at_onse' is unknown. Write 'at_once'"),
        ("container: {imag: x}\n", "container.imag: the key 'imag' is unknown. Write 'image'"),
        ("env: {X: [a]}\n", "a word, a number or a quoted text"),
        ("scratch: tmp\n", "an absolute path"),
        ("scratch: /tmp/`id`\n", "an absolute path"),
        ("setup: [\"a\\nb\"]\n", "one line of shell"),
        ("signal_seconds: 5\n", "signal_seconds"),
        ("memory: lots\n", "such as 1500G, or all"),
        ("nodes: 0\n", "nodes"),
        ("name: x\n", "a profile has no key 'name'"),
        ("extends: h100\n", "there is no cluster profile 'h100'"),
        ("extends: mine\n", "the profiles extend one another"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    kept = [line for line in PRIVATE.splitlines() if line.split(":")[0] != text.split(":")[0]]
    with pytest.raises(UserError) as error:
        load_cluster(written(tmp_path, "\n".join([*kept, text])))
    assert message in str(error.value)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean h100-32x8"):
        load_cluster("h100-32x")


def test_a_variable_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    cluster = load_cluster(written(tmp_path, PRIVATE + "shared: $NOT_SET/x\n"))
    with pytest.raises(UserError, match="the variable NOT_SET is not set"):
        _ = cluster.data
    monkeypatch.setenv("NOT_SET", "/somewhere")
    assert cluster.data == Path("/somewhere/x/data")


def test_times() -> None:
    assert [slurm_time(minutes) for minutes in (5, 90, 1440, 2 * 1440 + 61)] == [
        "0-00:05:00", "0-01:30:00", "1-00:00:00", "2-01:01:00",
    ]  # fmt: skip
    assert [hours(minutes) for minutes in (1440, 90, 10)] == ["24 h", "90 min", "10 min"]


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "clusters.md").read_text()
    for key in Cluster.model_fields:
        assert key == "name" or f"| {key}" in text or f", {key}" in text, key
    for key in (*Container.model_fields, *Mail.model_fields, *Sweep.model_fields):
        assert f"`{key}`" in text, key


def test_network_settings_carry_a_reason() -> None:
    for path in CLUSTERS.glob("*.yaml"):
        lines = path.read_text().splitlines()
        for above, line in itertools.pairwise(lines):
            if line.strip().startswith("NCCL_"):
                assert above.strip().startswith("#"), f"{path.name}: {line}"


def test_a_copy_of_a_profile_is_found_beside_it(tmp_path: Path) -> None:
    for path in CLUSTERS.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    written(tmp_path, (tmp_path / "h100-32x8.yaml").read_text().replace("24h", "12h"), "h100-32x8.yaml")
    assert load_cluster(tmp_path / "h100-8x8.yaml").time_limit == 720
