"""Types, defaults and texts of the settings `cluster.KEY` of all kinds of cluster, for help and completion."""

from dataclasses import MISSING, fields
from typing import Any

from megavit.cluster.azureml_config import AzureMLConfig
from megavit.cluster.config import ClusterConfig, LocalConfig, SlurmConfig
from megavit.cluster.kubernetes_config import KubernetesConfig
from megavit.config.overrides import types_of
from megavit.config.reference import explanations

CLUSTER = "cluster"
_KINDS = (ClusterConfig, LocalConfig, SlurmConfig, KubernetesConfig, AzureMLConfig)


def cluster_types() -> dict[str, Any]:
    """Return the type of each setting by its path."""
    found: dict[str, Any] = {}
    for kind in _KINDS:
        found |= types_of(kind, f"{CLUSTER}.")
    return found


def cluster_texts() -> dict[str, str]:
    """Return the explanation of each setting by its path."""
    return {f"{CLUSTER}.{key}": text for kind in _KINDS for key, text in explanations(kind).items()}


def cluster_defaults() -> dict[str, Any]:
    """Return the default of each setting by its path, without those that differ by kind of cluster."""
    found: dict[str, Any] = {}
    for kind in _KINDS:
        for part in fields(kind):
            made = part.default_factory() if part.default_factory is not MISSING else part.default
            found.setdefault(f"{CLUSTER}.{part.name}", made)
    del found[f"{CLUSTER}.kind"]
    return {key: value for key, value in found.items() if value is not MISSING}
