"""What `megavit submit` would hand to a cluster, for tests to read."""

from pathlib import Path

import yaml

from megavit.cluster.backend import Backend
from megavit.cluster.job import Job, plan_job
from megavit.cluster.registry import get_backend, split_cluster

# Everything that a shell, YAML or Kubernetes would take for more than a letter, but for line breaks.
EVIL = "a; touch X $(touch X) `touch X` 'q' \"r\" \\ $HOME $(HOME) $$(HOME) {{ x }} #: & | > X * ~ é"
EVILS = (EVIL, "; touch X", "$(touch X)", "'", '"', "x\ny: z", "${{inputs.x}}", "--")

GOLDEN = Path(__file__).parent / "golden"


def planned(*arguments: str) -> tuple[Backend, Job]:
    own, overrides = split_cluster(list(arguments))
    backend = get_backend(own)
    return backend, plan_job(overrides, backend.config)


def rendered(*arguments: str) -> str:
    backend, job = planned(*arguments)
    return backend.render(job)


def parsed(text: str) -> dict:
    (document,) = yaml.safe_load_all(text)
    return document


def typed(key: str, value: str) -> str:
    """A setting as a user types it, in Hydra's quotes."""
    doubled = value.replace('\\"', '\\\\\\"').replace('"', '\\"')
    return f'{key}="{doubled}"'


def setting_of(config_class: type, key: str, value: str) -> str:
    """A setting of a cluster as typed, where it takes several values one of them."""
    kind = type(getattr(config_class(), key))
    word = typed("", value)[1:]
    return {list: f"cluster.{key}=[{word}]", dict: f"cluster.{key}.KEY={word}"}.get(kind, f"cluster.{key}={word}")


# Of each task one recipe with a data path and one without; test_submit.py plans all of them.
RECIPES = {
    "digits": False,
    "digits_mae": False,
    "digits_probe": False,
    "mae_b16_800ep": True,
    "mae_b16_finetune": True,
    "mae_b16_probe": True,
}


def key_paths(document, prefix: str = "") -> set[str]:
    """Where a document has keys, list positions included."""
    items = (
        enumerate(document) if isinstance(document, list) else document.items() if isinstance(document, dict) else ()
    )
    found = set()
    for key, value in items:
        found |= {f"{prefix}/{key}"} | key_paths(value, f"{prefix}/{key}")
    return found
