"""`megavit COMMAND --help`, and --help with a group, a setting or an argument."""

from dataclasses import fields

import pytest

from megavit.cli.cluster_settings import cluster_texts, cluster_types
from megavit.cli.help import help_text
from megavit.cli.main import main
from megavit.cli.train import TrainArgs
from megavit.config.experiment import ExperimentConfig
from megavit.config.search_path import choices, groups
from megavit.config.settings import settings_below


def printed(capsys, *typed: str) -> str:
    assert main(list(typed)) == 0
    return capsys.readouterr().out


def test_help_of_train_lists_flags_groups_and_choices(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("")
    out = printed(capsys, "train", "--help", "-cd", str(tmp_path))
    joined = out.replace("|\n      ", "|")
    for group in groups():
        names = sorted([*choices(group), "mine"]) if group == "model" else choices(group)
        assert f"\n  {group}={'|'.join(names)}\n" in joined
    assert "\n  --cfg [job|hydra|all], -c  print the configuration" in out
    assert "\nmegavit train --help GROUP shows the settings of a group" in out
    assert max(map(len, out.splitlines()[2:])) <= 120


@pytest.mark.parametrize("group", [part.name for part in fields(ExperimentConfig) if part.name != "init_from"])
def test_a_groups_help_explains_each_of_its_settings(group):
    lines = help_text("megavit train", TrainArgs, ["--help", group], about="", settings=True).splitlines()
    for key in settings_below(group):
        (at,) = [i for i, line in enumerate(lines) if line.startswith((f"  {key}=", f"  {key}  ("))]
        assert lines[at].endswith(")")
        assert len(lines[at + 1].strip()) > 3


def test_one_setting_shows_the_value_that_the_other_words_lead_to(capsys):
    expected = "  model.drop_path=0.1  (number)\n      probability of dropping a residual branch in the last layer;"
    assert printed(capsys, "train", "--help", "model.drop_path", "model.drop_path=0.1").startswith(expected)
    assert printed(capsys, "train", "recipe=digits_mae", "--help=task.mask_ratio").startswith(
        "  task.mask_ratio=0.75  (number)\n"
    )
    assert "  task.mask_ratio  (number; task=mae)\n" in printed(capsys, "train", "--help", "task")
    enum = printed(capsys, "train", "-h", "parallel.recompute")
    assert "(" in enum and "selective" in enum.partition("\n")[0]
    assert printed(capsys, "train", "--help", "optim.betas").startswith(
        "  optim.betas=[0.9,0.999]  (list of number or null)\n"
    )
    assert printed(capsys, "train", "--help", "init_from").startswith(
        "  init_from=null  (text or null)\n      weights that"
    )


def test_submit_explains_the_settings_of_clusters(capsys):
    out = printed(capsys, "submit", "--help", "cluster")
    assert "\n  cluster=slurm " in out
    for key in cluster_types():
        assert f"\n  {key}=" in out or f"\n  {key}  (" in out
        assert cluster_texts()[key]


def test_an_argument_of_the_commands_own_is_explained(capsys):
    assert printed(capsys, "train", "--help", "package").startswith("megavit train [--package PATH]\n      with --cfg,")
    assert (
        printed(capsys, "recipes", "--help")
        == "megavit recipes\n\nlist the complete experiments that come with megavit\n"
    )


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("train --help modl", "--help modl: the setting modl does not exist; did you mean model"),
        (
            "train --help model.pach_size",
            "--help model.pach_size: the setting model.pach_size does not exist; did you mean",
        ),
        (
            "train --help optim.learning_rate",
            "--help optim.learning_rate: the setting optim.learning_rate does not exist; did you mean optim.lr?",
        ),
        ("train --help optim.decay", "--help optim.decay: optim.decay is renamed to optim.schedule"),
        ("train --help recipe recipe=digit", "recipe=digit does not exist; did you mean recipe=digits"),
        ("train --help packge", "megavit train has no argument packge; did you mean package?"),
        (
            "submit --help cluster.partitoin",
            "--help cluster.partitoin: cluster.partitoin does not exist; did you mean cluster.partition",
        ),
        ("recipes --help digits", "megavit recipes has no argument digits; it has none"),
    ],
)
def test_an_unknown_topic_suggests_the_nearest(typed, message, capsys):
    assert main(typed.split()) == 2
    assert capsys.readouterr().err.startswith(f"megavit: {message}")
