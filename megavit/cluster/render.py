"""Fill in the templates of `launch/`; a value can never become a command or a key."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from megavit.errors import ConfigError

# Words in the names of variables that hold secrets.
_SECRET = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|SAS|CONNECTION_?STRING)(?:_|$)|(?:API|ACCESS|_)KEY(?:_|$)",
    re.I,
)
# Shorter values occur in ordinary words.
_SECRET_LENGTH = 8
# Credentials in a URL: user:password@, or a signature.
_SIGNED = re.compile(r"://[^/\s@]*:[^/\s@]*@|[?&](sig|signature|token|X-Amz-Signature|X-Goog-Signature)=", re.I)


def render_shell(template: str, values: Mapping[str, Any]) -> str:
    """Fill in a shell script; each value becomes one quoted word, each item of a list another one.

    Args:
        template: name of the file in `launch/`.
        values: values by name.
    """
    return _render(template, values, _quote)


def render_yaml(template: str, values: Mapping[str, Any]) -> str:
    """Fill in a YAML file; each value becomes one JSON value, which is YAML too.

    Args:
        template: name of the file in `launch/`.
        values: values by name.
    """
    return _render(template, values, lambda value: json.dumps(value, ensure_ascii=False))


def refuse_secrets(text: str, *, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to write a secret of the user into a file.

    Args:
        text: rendered job, which is kept in the run's folder and submitted.
        environment: environment whose secrets are searched for.

    Raises:
        ConfigError: naming the variable or the form, never the secret.
    """
    for name, value in environment.items():
        # A variable such as GOOGLE_APPLICATION_CREDENTIALS names a file. Not pathlib's exists(), which raises on a
        # token that is too long for a name, and shows it.
        is_file = os.path.isabs(value) and os.path.exists(value)
        if _SECRET.search(name) and len(value) >= _SECRET_LENGTH and value in text and not is_file:
            raise ConfigError(
                f"the job would be written down with the value of ${name} in it, and everybody who reads the run's "
                f"folder could read that; leave it away: launch/README.md says how a job gets it"
            )
    if signed := _SIGNED.search(text):
        what = "a password" if signed.group().startswith("://") else f"a signature ({signed.group().strip('?&=')}=)"
        raise ConfigError(
            f"the job would be written down with {what} in a URL, for everybody to read; give the job access by its "
            f"environment instead: launch/README.md says how"
        )


def refuse_secret_names(environment: Mapping[str, str]) -> None:
    """Refuse variables of `cluster.env` whose name is a secret's.

    Raises:
        ConfigError: naming the variable.
    """
    for name in environment:
        if _SECRET.search(name):
            raise ConfigError(
                f"cluster.env.{name} would be written into the job and the run's folder, for everybody to read; leave "
                f"it away: launch/README.md says how a job gets it"
            )


def _render(template: str, values: Mapping[str, Any], finalize: Any) -> str:
    environment = Environment(
        undefined=StrictUndefined, finalize=finalize, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    source = files("megavit.launch").joinpath(template).read_text()
    return environment.from_string(source).render(**values)


def _quote(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(shlex.quote(str(word)) for word in value)
    return shlex.quote(str(value))
