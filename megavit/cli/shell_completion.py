"""Completion in a shell: its scripts, where they are installed, and the call that each press of the key makes."""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from megavit.cli.complete import SHELLS, candidates
from megavit.errors import ConfigError

FLAG = "--shell-completion"
# The first word of the calls that the scripts make.
_CALL = "candidates"
# Signs in the names of files that bash would read.
_UNSAFE = re.compile(r"([\s\"'`$&|;<>()*?!#\\{}])")
_MARK = "# completion of megavit"

_BASH = """\
# Completion of megavit for bash.
_megavit() {
    local IFS=$'\\n'
    COMPREPLY=($("${COMP_WORDS[0]}" --shell-completion candidates bash "$COMP_WORDBREAKS" "${COMP_LINE:0:COMP_POINT}" \\
        2>/dev/null))
    if [[ ${COMPREPLY[0]-} == *[=./] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -F _megavit megavit
"""

_ZSH = """\
#compdef megavit
# Completion of megavit for zsh.
_megavit() {
    local -a found open
    found=("${(@f)$("${(Q)words[1]}" --shell-completion candidates zsh "${(@Q)words[1,CURRENT]}" 2>/dev/null)}")
    open=(${(M)found:#*[=./]})
    found=(${found:#*[=./]})
    compadd -S '' -a open
    compadd -a found
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _megavit megavit
"""

_FISH = """\
# Completion of megavit for fish.
complete -c megavit -f -a \\
    '(megavit --shell-completion candidates fish (commandline -opc) (commandline -ct) 2>/dev/null)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def run(arguments: list[str], commands: Mapping[str, tuple[str, str]]) -> None:
    """Print a script, install or uninstall it, or print what may be typed next.

    Args:
        arguments: SHELL, install=SHELL or uninstall=SHELL; or the words of a call from a script.
        commands: module and function of each command.

    Raises:
        ConfigError: for another word, or a file that cannot be written.
    """
    if arguments[:1] == [_CALL]:
        print("\n".join(_answer(arguments[1:], commands)))
        return
    action, sign, shell = arguments[0].rpartition("=") if len(arguments) == 1 else ("", "", "")
    if shell not in SHELLS or f"{action}{sign}" not in ("", "install=", "uninstall="):
        known = "|".join(SHELLS)
        typed = " ".join([FLAG, *arguments])
        raise ConfigError(f"{typed}: write {FLAG} install={known}, uninstall={known}, or {known} to print the script")
    if not action:
        print(_SCRIPTS[shell], end="")
        return
    try:
        for line in _install(shell) if action == "install" else _uninstall(shell):
            # Comments, for those who type eval "$(…)".
            print(f"# {line}")
    except OSError as error:
        raise ConfigError(f"{FLAG} {arguments[0]}: {error.filename} cannot be written: {error.strerror}") from error


def _answer(arguments: list[str], commands: Mapping[str, tuple[str, str]]) -> list[str]:
    shell, *words = arguments
    if shell != "bash":
        return candidates(words, commands)
    breaks, line = words
    try:
        words = shlex.split(line)
    except ValueError:
        # A quote is open.
        return []
    if not words or line[-1:].isspace():
        words.append("")
    # bash replaces the part behind the last of these alone.
    kept = max((words[-1].rfind(sign) + 1 for sign in "=:" if sign in breaks), default=0)
    return [_UNSAFE.sub(r"\\\1", found[kept:]) for found in candidates(words, commands)]


def _files(shell: str) -> tuple[Path, Path | None]:
    """Return the script's file, and the file in which a line reads it; fish reads its own folder."""
    home = Path.home()
    if shell == "fish":
        return _folder("XDG_CONFIG_HOME", home / ".config") / "fish" / "completions" / "megavit.fish", None
    script = _folder("XDG_DATA_HOME", home / ".local" / "share") / "megavit" / f"completion.{shell}"
    if shell == "zsh":
        return script, _folder("ZDOTDIR", home) / ".zshrc"
    return script, home / ".bashrc"


def _folder(variable: str, default: Path) -> Path:
    return Path(os.environ.get(variable) or default)


def _install(shell: str) -> list[str]:
    script, startup = _files(shell)
    is_there = script.is_file() and script.read_text() == _SCRIPTS[shell]
    if not is_there:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(_SCRIPTS[shell])
    said = [f"{script}: {'is there already' if is_there else 'written'}"]
    if startup is not None:
        line = f"source {shlex.quote(str(script))}  {_MARK}\n"
        text = startup.read_text() if startup.is_file() else ""
        if line in text:
            said.append(f"{startup}: reads it already")
        else:
            others = _without_ours(text)
            startup.write_text(f"{others}{'' if others.endswith(chr(10)) or not others else chr(10)}{line}")
            said.append(f"{startup}: the line '{line.strip()}' is added")
    return [*said, f"it works in the next {shell}"]


def _uninstall(shell: str) -> list[str]:
    script, startup = _files(shell)
    said = [f"{script}: {'removed' if script.is_file() else 'is not there'}"]
    script.unlink(missing_ok=True)
    if startup is not None and startup.is_file():
        text = startup.read_text()
        others = _without_ours(text)
        if others != text:
            startup.write_text(others)
            said.append(f"{startup}: the line that read it is removed")
    return said


def _without_ours(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.rstrip().endswith(_MARK))
