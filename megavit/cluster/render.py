"""Fill in the templates of `launch/`, so that no value can become a command or a key."""

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
    """Fill in a shell script; each value, and each item of a list, becomes one quoted word.

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
    """Check that a rendered job contains no secret of the user.

    Args:
        text: rendered job, which is stored in the run's folder and submitted.
        environment: environment whose secrets are searched for.

    Raises:
        ConfigError: if it does; names the variable or the kind of secret, never its value.
    """
    for name, value in environment.items():
        # A variable such as GOOGLE_APPLICATION_CREDENTIALS names a file. Do not use pathlib's exists(): for a token
        # that is too long for a file name it raises an error that shows the token.
        is_file = os.path.isabs(value) and os.path.exists(value)
        if _SECRET.search(name) and len(value) >= _SECRET_LENGTH and value in text and not is_file:
            raise ConfigError(
                f"the job's file would contain the value of ${name}, readable for everybody who can read the run's "
                f"folder; remove it: launch/README.md shows how a job gets secrets"
            )
    if signed := _SIGNED.search(text):
        what = "a password" if signed.group().startswith("://") else f"a signature ({signed.group().strip('?&=')}=)"
        raise ConfigError(
            f"the job's file would contain {what} in a URL, readable for everybody; give the job access by its "
            f"environment instead: launch/README.md shows how"
        )


def refuse_secret_names(environment: Mapping[str, str]) -> None:
    """Check that no name of `cluster.env` is one of a secret.

    Raises:
        ConfigError: if one is; names the variable.
    """
    for name in environment:
        if _SECRET.search(name):
            raise ConfigError(
                f"cluster.env.{name} would be written to the job's file in the run's folder, readable for everybody; "
                f"remove it: launch/README.md shows how a job gets secrets"
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
