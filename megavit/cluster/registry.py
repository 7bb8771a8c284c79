"""Read `cluster=…` and `cluster.KEY=…` of a command line, separately from the run's settings."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megavit.cluster.azureml import AzureML
from megavit.cluster.backend import Backend
from megavit.cluster.config import ClusterConfig, Kind
from megavit.cluster.kubernetes import Kubernetes
from megavit.cluster.local import Local
from megavit.cluster.slurm import Slurm
from megavit.config.overrides import key_of, read_setting, read_text, types_of
from megavit.config.search_path import SearchPath
from megavit.config.settings import flatten
from megavit.errors import ConfigError
from megavit.validation import suggest

BACKENDS: dict[Kind, type[Backend]] = {
    Kind.local: Local,
    Kind.slurm: Slurm,
    Kind.azureml: AzureML,
    Kind.kubernetes: Kubernetes,
}


def split_cluster(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the cluster's settings and the run's."""
    cluster_args = [text for text in arguments if text.startswith(("cluster=", "cluster."))]
    return cluster_args, [text for text in arguments if text not in cluster_args]


def get_backend(arguments: list[str], *, search: SearchPath | None = None) -> Backend:
    """Return the cluster that `cluster=…` names, with the checked `cluster.KEY=…` of the command line.

    Args:
        arguments: `cluster=NAME` from conf/cluster/, or `cluster=FILE.yaml`, and `cluster.KEY=VALUE`.
        search: the user's folders, whose clusters exist too.

    Raises:
        ConfigError: for an unknown cluster or key, a value of a wrong type, or a contradiction.
    """
    named = [text for text in arguments if text.startswith("cluster=")]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)}: a job goes to one cluster")
    name = read_text(named[0].removeprefix("cluster=")) if named else "local"
    settings = _read(name, search or SearchPath())
    kind = settings.get("kind")
    if kind not in [known.value for known in Kind]:
        raise ConfigError(f"cluster={name}: kind={kind} does not exist; known: {', '.join(k.value for k in Kind)}")
    backend = BACKENDS[Kind(kind)]
    schema = OmegaConf.structured(backend.config_class)
    typed: dict[str, Any] = {}
    types = types_of(backend.config_class, "cluster.")
    known = [path.removeprefix("cluster.") for path in types]
    for text in arguments:
        if text in named:
            continue
        key = key_of(text).removeprefix("cluster.")
        if key.partition(".")[0] not in known:
            near = suggest(key, known, cutoff=0.5)
            hint = f"did you mean cluster.{near}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"cluster={name} has no setting cluster.{key}; {hint}")
        setting = read_setting(text, types)
        if setting.override.is_sweep_override():
            raise ConfigError(
                f"'{text}' gives several values; --multirun sweeps the run's settings, a list goes in [a,b]"
            )
        typed[key] = setting.value
    for key in settings:
        if key not in known:
            raise ConfigError(f"cluster={name}: {key} does not exist; known: {', '.join(known)}")
    try:
        merged = OmegaConf.merge(schema, settings)
        for key, value in typed.items():
            OmegaConf.update(merged, key, value)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cluster.{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, ClusterConfig)
    _refuse_control_characters(flatten(config))
    config.check()
    return backend(config)


class _AsWritten(yaml.SafeLoader):
    """A YAML loader that reads every word except null as text; the setting's type decides what is a number."""


_AsWritten.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read(name: str, search: SearchPath) -> dict[str, Any]:
    own_file = name.endswith((".yaml", ".yml"))
    known = search.choices("cluster")
    if not own_file and name not in known:
        near = suggest(name, known, cutoff=0.5)
        hint = f"did you mean cluster={near}?" if near else f"known: {', '.join(known)}, or FILE.yaml"
        raise ConfigError(f"cluster={name} does not exist; {hint}")
    path = Path(name) if own_file else search.file_of(f"cluster/{name}")
    assert path is not None
    try:
        read = yaml.load(path.read_text(), Loader=_AsWritten)
    except OSError as error:
        raise ConfigError(f"cluster={name} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster={name} is not valid YAML: {error}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"cluster={name} must hold keys and values, kind: slurm for example")
    return read


def _refuse_control_characters(settings: dict[str, Any]) -> None:
    """Raise ConfigError for a control character: a line break would start a new line of the rendered file."""
    for key, value in settings.items():
        words = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for word in words:
            if isinstance(word, str) and any(ord(letter) < 32 or ord(letter) == 127 for letter in word):
                raise ConfigError(f"cluster.{key}={word!r} holds a line break or another control character")
