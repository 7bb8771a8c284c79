"""Where a composition finds its YAML files: megavit's own, folders and files of the user's."""

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from megavit.config.overrides import key_of, list_items, read_text
from megavit.errors import ConfigError, printable

PRIMARY = "train"
SUFFIXES = (".yaml", ".yml")

# Schemes of the sources of `user_files.py` in Hydra's search path.
FOLDER_SCHEME, FILE_SCHEME = "megavit-folder", "megavit-file"

_CONFIG_DIR, _CONFIG_NAME, _START_TIME, _SEARCHPATH = (
    "--config-dir=",
    "--config-name=",
    "--start-time=",
    "hydra.searchpath=",
)
_TOKENS = (_CONFIG_DIR, _CONFIG_NAME, _START_TIME, _SEARCHPATH)


def config_dir() -> Path:
    """Return megavit's folder of YAML files, in the repository or in the installed package."""
    return Path(str(files("megavit.conf").joinpath(f"{PRIMARY}.yaml"))).parent


def choices(group: str) -> list[str]:
    """Return megavit's own choices of a group, such as `model` or `recipe`."""
    return SearchPath().choices(group)


def groups() -> list[str]:
    """Return the Hydra groups, without `cluster`, which only megavit submit reads."""
    return [name for name in _group_folders() if name != "cluster"]


def _group_folders() -> list[str]:
    folders = (path for path in config_dir().iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return sorted(path.name for path in folders)


@dataclass(frozen=True)
class UserFile:
    """A file that is chosen by its path, as in recipe=FILE.yaml.

    Attributes:
        group: the group that it is a choice of.
        path: the file.
        name: the name of the choice, in Hydra's defaults list.
    """

    group: str
    path: Path
    name: str


@dataclass(frozen=True)
class SearchPath:
    """The folders and files of the user's that take part in a composition.

    Attributes:
        first: folders whose choices come before megavit's own (--config-dir).
        last: folders and packages whose choices come after them (conf/ here, hydra.searchpath).
        found: `conf` in the working directory, if it has choices; part of `last`.
        files: files that are chosen by their paths.
        config_name: the configuration that the defaults list begins with.
        start_time: what ${now:…} reads, in ISO format; None reads the clock.
    """

    first: tuple[Path, ...] = ()
    last: tuple[str, ...] = ()
    found: Path | None = None
    files: tuple[UserFile, ...] = ()
    config_name: str = PRIMARY
    start_time: str | None = None

    @property
    def is_users(self) -> bool:
        """Return whether a folder or a file of the user's takes part."""
        return bool(self.first or self.last or self.files)

    def folders(self) -> list[Path]:
        """Return the user's folders, in the order of the search, with megavit's own in its place."""
        last = [Path(text.removeprefix("file://")) for text in self.last if not text.startswith("pkg://")]
        return [*self.first, config_dir(), *last]

    def choices(self, group: str) -> list[str]:
        """Return the choices of a group, the user's included."""
        folders = [folder / group for folder in self.folders()]
        files = [(path, folder) for folder in folders for path in folder.rglob("*.yaml")]
        return sorted({path.relative_to(folder).with_suffix("").as_posix() for path, folder in files})

    def file_of(self, config_path: str) -> Path | None:
        """Return the file of a configuration such as `model/vit_b16`; None for what is no file, such as a schema."""
        for file in self.files:
            if config_path == f"{file.group}/{file.name}":
                return file.path
        for folder in self.folders():
            if (folder / f"{config_path}.yaml").is_file():
                return folder / f"{config_path}.yaml"
        siblings = (file.path.with_name(f"{Path(config_path).name}.yaml") for file in self.files)
        return next((path for path in siblings if path.is_file()), None)

    def sources_before(self) -> list[tuple[str, str]]:
        """Return Hydra's providers and paths that come before megavit's own, in the order of the search."""
        return [("--config-dir", f"{FOLDER_SCHEME}://{folder}") for folder in self.first]

    def sources_after(self) -> list[tuple[str, str]]:
        """Return Hydra's providers and paths that come after megavit's own, in the order of the search."""
        last = [
            (
                "conf" if text == str(self.found) else "hydra.searchpath",
                text if text.startswith("pkg://") else f"{FOLDER_SCHEME}://{text}",
            )
            for text in self.last
        ]
        files = [
            (f"{file.group}=FILE", f"{FILE_SCHEME}://{json.dumps([file.group, file.name, str(file.path)])}")
            for file in self.files
        ]
        return [*last, *files]

    def with_files(self, group: str, value: str) -> tuple["SearchPath", str]:
        """Add the files that the choice of a group names by path.

        Args:
            group: the group.
            value: its choice as typed: NAME, FILE.yaml or [NAME,FILE.yaml].

        Returns:
            The search path with the files, and the choice with their names in place of the paths.
        """
        is_list = value.startswith("[") and value.endswith("]")
        items = list_items(value) if is_list else [read_text(value)]
        path, names = self, []
        for item in items:
            if item.endswith(SUFFIXES):
                path, item = path._with_file(group, item)
            names.append(item)
        return path, f"[{','.join(names)}]" if is_list else names[0]

    def _with_file(self, group: str, typed: str) -> tuple["SearchPath", str]:
        path = Path(typed)
        if not path.is_file():
            stem = path.with_suffix("").as_posix()
            hint = f"; did you mean {group}={stem}?" if stem in self.choices(group) else ""
            why = "is a folder" if path.is_dir() else "does not exist"
            raise ConfigError(f"{group}={printable(typed)}: the file {printable(str(path.absolute()))} {why}{hint}")
        name = f"file{len(self.files)}"
        return replace(self, files=(*self.files, UserFile(group, path.absolute(), name))), name


def split_search_path(overrides: list[str]) -> tuple[SearchPath, list[str]]:
    """Split the words that say where files are from a command line.

    Args:
        overrides: as typed: --config-dir=DIR, --config-name=NAME, --start-time=TIME, hydra.searchpath=[…] and others.

    Returns:
        The search path, without the files that choices name, and the other overrides.

    Raises:
        ConfigError: for a folder that does not exist.
    """
    words = [text for text in overrides if text.startswith(_TOKENS)]
    first = tuple(_folder(text, _CONFIG_DIR) for text in words if text.startswith(_CONFIG_DIR))
    appended = [text for text in words if text.startswith(_SEARCHPATH)]
    found = _conf_here(first)
    last = [str(found)] if found else []
    for text in appended:
        last += [_searched(item, text) for item in list_items(text.removeprefix(_SEARCHPATH))]
    names = [text.removeprefix(_CONFIG_NAME) for text in words if text.startswith(_CONFIG_NAME)]
    times = [text.removeprefix(_START_TIME) for text in words if text.startswith(_START_TIME)]
    path = SearchPath(
        first,
        tuple(last),
        found,
        config_name=(names or [PRIMARY])[-1].removesuffix(".yaml"),
        start_time=times[-1] if times else None,
    )
    if not path.file_of(path.config_name):
        raise ConfigError(
            f"--config-name={path.config_name}: no {path.config_name}.yaml in {', '.join(map(str, path.folders()))}"
        )
    return path, [text for text in overrides if not text.startswith(_TOKENS)]


def group_of(typed: str) -> str | None:
    """Return the group that an override chooses, or None."""
    key = key_of(typed)
    return key if key in groups() else None


def _folder(typed: str, sign: str) -> Path:
    path = Path(read_text(typed.removeprefix(sign))).absolute()
    if not path.is_dir():
        raise ConfigError(f"{typed}: the folder {printable(str(path))} does not exist")
    return path


def _searched(item: str, typed: str) -> str:
    if item.startswith("pkg://"):
        return item
    if "://" in item and not item.startswith("file://"):
        raise ConfigError(f"{typed}: {item} must be a folder, file://FOLDER or pkg://PACKAGE")
    path = Path(read_text(item.removeprefix("file://"))).absolute()
    if not path.is_dir():
        raise ConfigError(f"{typed}: the folder {printable(str(path))} does not exist")
    return str(path)


def _conf_here(first: tuple[Path, ...]) -> Path | None:
    """Return conf/ of the working directory if it has choices and is not megavit's own."""
    here = Path("conf").absolute()
    is_copy_of_ours = (here / f"{PRIMARY}.yaml").is_file() and (here / "own_images.yaml").is_file()
    if not here.is_dir() or is_copy_of_ours or here.resolve() in [folder.resolve() for folder in first]:
        return None
    return here if any(any((here / group).glob("*.yaml")) for group in _group_folders()) else None
