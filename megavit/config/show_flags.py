"""What of a composed configuration the flags --cfg and --info show; the standard library alone."""

from enum import Enum


class Part(Enum):
    """`job`: the run's settings; `hydra`: Hydra's own; `all`: both."""

    job = "job"
    hydra = "hydra"
    all = "all"


class Topic(Enum):
    """`defaults`: list of the files in their order; `defaults-tree`: which file names which; `searchpath`: where files
    are searched; `config`: these three and the configuration; `plugins`: of Hydra; `all`: everything.
    """

    all = "all"
    config = "config"
    defaults = "defaults"
    defaults_tree = "defaults-tree"
    searchpath = "searchpath"
    plugins = "plugins"
