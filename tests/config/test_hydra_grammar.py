"""The override grammar next to `hydra.main` on the same configuration: the same result, or a documented difference.

docs/configuration.md lists the differences.
"""

import sys
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from megavit.config.compose import compose
from megavit.config.search_path import config_dir
from megavit.config.settings import flatten
from megavit.errors import ConfigError

SAME, BOTH_REFUSE, WE_REFUSE, DIFFERENT = "same", "both refuse", "we refuse", "different"

# Overrides, two blanks between them; how the two compare; the setting that differs, or our refusal.
TABLE = [
    ("train.steps=3", SAME, ""),
    ("optim.lr=1e-3", SAME, ""),
    ("optim.lr=.5", SAME, ""),
    ("optim.lr=5", SAME, ""),
    ("optim.betas=[0.9,0.95]", SAME, ""),
    ("optim.betas=[0.9, 0.95]", SAME, ""),
    ("optim.freeze=null", SAME, ""),
    ("data.flip=true", SAME, ""),
    ("data.flip=TRUE", SAME, ""),
    ("data.flip=yes", SAME, ""),
    ("data.flip=1", SAME, ""),
    ("data.mean=[0.5]", SAME, ""),
    ("data.image_size=[32,32]", SAME, ""),
    ("data.crop_scale=null", SAME, ""),
    ("model=vit_b16", SAME, ""),
    ("model=vit_b16  model.num_layers=3", SAME, ""),
    ("model.num_layers=3  model=vit_b16", SAME, ""),
    ("optim=sgd", SAME, ""),
    ("optim=lars  optim.lr=0.1", SAME, ""),
    ("task=mae", SAME, ""),
    ("task=mae  task.mask_ratio=0.5", SAME, ""),
    ("recipe=digits_mae", SAME, ""),
    ("recipe=[digits,digits_mae]", SAME, ""),
    ("recipe=digits_mae  model=vit_s16", SAME, ""),
    ("~recipe", SAME, ""),
    ("~recipe=digits", SAME, ""),
    ("~optim", SAME, ""),
    ("~model", SAME, ""),
    ("data=synthetic  recipe=digits", SAME, ""),
    ("run.seed=7", SAME, ""),
    ("++run.seed=7", SAME, ""),
    ("++train.stop_at=5", SAME, ""),
    ("+train.stop_at=5", SAME, ""),
    ("run.name='a b'", SAME, ""),
    ('run.name="a b"', SAME, ""),
    ("run.name=a_b-c", SAME, ""),
    ("run.name=${model.num_layers}", SAME, ""),
    ("run.seed=${model.num_layers}", SAME, ""),
    ("run.dir=x/${run.name}", SAME, ""),
    ("run.name=${oc.env:HOME}", SAME, ""),
    ("data.classes=[a,b]", SAME, ""),
    ("data.classes=['a,b',c]", SAME, ""),
    ("optim.lr=float(1)", SAME, ""),
    ("run.seed=int(7.9)", SAME, ""),
    ("init_from=null", SAME, ""),
    ("run.seed=007", SAME, ""),
    ("train.nothing=1", BOTH_REFUSE, "train.nothing does not exist"),
    ("+train.nothing=1", WE_REFUSE, "train.nothing does not exist"),
    ("++train.nothing=1", WE_REFUSE, "train.nothing does not exist"),
    ("+run.seed=7", BOTH_REFUSE, "write run.seed=VALUE"),
    ("+model=vit_b16", BOTH_REFUSE, "Multiple values for model"),
    ("model@other=vit_b16", BOTH_REFUSE, "model@other"),
    ("model=nothing", BOTH_REFUSE, "model=nothing does not exist"),
    ("~model=vit_b16", BOTH_REFUSE, "Could not delete 'model=vit_b16'"),
    ("~run.name", BOTH_REFUSE, "a setting cannot be deleted"),
    ("train.steps=many", BOTH_REFUSE, "could not be converted to Integer"),
    ("optim.lr=1,2", BOTH_REFUSE, "gives several values"),
    ("optim.lr=choice(1,2)", BOTH_REFUSE, "gives several values"),
    ("optim.lr", BOTH_REFUSE, "write key=value"),
    ("data.mean=[0.5", BOTH_REFUSE, "cannot be read"),
    ("run.name=${nothing}", BOTH_REFUSE, "'nothing' not found"),
    ("~train", WE_REFUSE, "set one of them: train.steps"),
    ("train={steps: 5}", WE_REFUSE, "set one of them: train.steps"),
    ("hydra.job.name=x", WE_REFUSE, "a setting of Hydra's own application"),
    ("run.name=1.10", DIFFERENT, "run.name"),
    ("run.name=1e3", DIFFERENT, "run.name"),
    ("run.name=2024_06_01", DIFFERENT, "run.name"),
    ("data.path=~/x", DIFFERENT, "data.path"),
    ("data.classes=[1_1,true]", DIFFERENT, "data.classes"),
    ("train.epochs=2", DIFFERENT, "train.steps"),
    ("optim.warmup_steps=5", DIFFERENT, "optim.shorten_warmup"),
    ("data.path=/x", DIFFERENT, "train.steps"),
    ("recipe=null", DIFFERENT, "run.name"),
    ("data.image_size=32", DIFFERENT, "data.image_size"),
]


def _by_hydra(line: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any] | None:
    """Return the settings that `hydra.main` composes, or None if it refuses."""
    compose([])  # stores the types
    GlobalHydra.instance().clear()
    composed: list[Any] = []
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.run.dir=."]
    monkeypatch.setattr(sys, "argv", ["app", *quiet, *line])
    main = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")
    try:
        main(lambda config: composed.append(OmegaConf.to_object(config)))()
    except (SystemExit, Exception):
        return None
    finally:
        GlobalHydra.instance().clear()
    config = composed[0]
    config.task = config.task.with_sizes(config.model)
    return flatten(config)


@pytest.mark.parametrize(("line", "comparison", "what"), TABLE, ids=[row[0] for row in TABLE])
def test_an_override_means_what_it_means_to_hydra(line, comparison, what, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    words = line.split("  ")
    by_hydra = _by_hydra(words, monkeypatch)
    if comparison in (BOTH_REFUSE, WE_REFUSE):
        assert (by_hydra is None) == (comparison == BOTH_REFUSE)
        with pytest.raises(ConfigError) as refused:
            compose(words)
        assert what in str(refused.value)
        return
    ours = flatten(compose(words))
    if comparison == SAME:
        assert ours == by_hydra
    else:
        assert by_hydra is None or ours[what] != by_hydra.get(what)
