"""A new task is one file, one YAML and one row: train segmentation, whose targets are cropped as their images."""

import shutil

import pytest

from megavit.config import compose, search_path
from megavit.config.saved import from_yaml, to_yaml
from megavit.config.search_path import config_dir
from megavit.errors import ConfigError
from megavit.task.registry import TASKS
from tests.distributed import run_ranks
from tests.reference import SMALL
from tests.task import toy_segmentation

YAML = """\
defaults:
  - segment_settings

name: segment
implementation: null
pixel_classes: 2
"""
SEGMENT = [
    *SMALL,
    "task=segment",
    "data.source=tests.task.toy_segmentation:Rectangles",
    "data.image_size=16",
    "model.patch_size=4",
    "model.num_layers=2",
    "model.positions=learned",
    "data.mean=[0.5]",
    "data.std=[0.5]",
    "data.flip=true",
    "data.crop_scale=[0.5,1.0]",
    "train.steps=60",
    "optim.lr=3e-3",
    "optim.warmup_steps=5",
]


LAYOUT_STEPS = 10


@pytest.fixture
def conf_dir(tmp_path):
    """Copy the folder of YAML files and add one."""
    folder = tmp_path / "conf"
    shutil.copytree(config_dir(), folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "task" / "segment.yaml").write_text(YAML)
    return folder


def test_a_task_with_dense_targets_trains_in_each_layout(conf_dir, tmp_path, figure):
    overrides = [*SEGMENT, f"run.dir={tmp_path / 'one'}"]
    alone = run_ranks(toy_segmentation.train, 1, str(conf_dir), overrides)[0]
    figure(f"dense targets, one rank: loss {alone[0]:.3f}, after {len(alone)} steps {alone[-1]:.3f}")
    # Measured 0.861, then 0.083. Without the images the loss stays at the entropy of the classes, 0.40.
    assert alone[-1] < 0.2 < 0.6 < alone[0]
    for layout in ("parallel.pp=2", "parallel.tp=2"):
        length = [f"train.stop_at={LAYOUT_STEPS}", f"train.eval_every={LAYOUT_STEPS}"]
        overrides = [*SEGMENT, layout, *length, f"run.dir={tmp_path / layout}"]
        losses = run_ranks(toy_segmentation.train, 2, str(conf_dir), overrides)[0]
        worst = max(abs(loss - other) for loss, other in zip(losses, alone[:LAYOUT_STEPS], strict=True))
        figure(f"dense targets, {layout}: {LAYOUT_STEPS} losses within {worst:.1e} of one rank's")
        assert worst <= 1e-5


def test_the_settings_of_a_new_task_are_known_and_suggested(conf_dir, monkeypatch):
    monkeypatch.setitem(TASKS, "segment", toy_segmentation.ROW["segment"])
    for module in (compose, search_path):
        monkeypatch.setattr(module, "config_dir", lambda: conf_dir)
    config = compose.compose(["task=segment", "task.pixel_classes=5"])
    assert config.task == toy_segmentation.SegmentConfig(pixel_classes=5)
    assert from_yaml(to_yaml(config)) == config
    with pytest.raises(ConfigError, match=r"would be ignored by task\.name=mae: it is a setting of task=segment"):
        compose.compose(["task=mae", "task.pixel_classes=5"])
    with pytest.raises(ConfigError, match=r"did you mean task\.pixel_classes"):
        compose.compose(["task=segment", "task.pixel_clases=5"])
