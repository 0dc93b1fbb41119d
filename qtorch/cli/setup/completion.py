"""`qtorch completion`: print the script by which a shell completes commands and settings."""

from __future__ import annotations

from collections.abc import Sequence

from qtorch.cli.main import COMMANDS
from qtorch.core.errors import ConfigError, unknown_name_message

USAGE = """\
qtorch completion: complete commands, and the settings of qtorch train, with the Tab key

usage: eval "$(qtorch completion bash)"      in bash, or as a line of ~/.bashrc
       eval "$(qtorch completion zsh)"       in zsh, or as a line of ~/.zshrc
"""
# Hydra answers for `qtorch train`. Its own script (`-sc install=bash`) knows no subcommands: it
# would ask `qtorch` alone, and takes the first word of the line for the program.
BASH = """\
_qtorch() {
    local word="${COMP_WORDS[COMP_CWORD]}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=( $(compgen -W "@COMMANDS@" -- "$word") )
        COMPREPLY=( "${COMPREPLY[@]/%/ }" )
    elif [ "${COMP_WORDS[1]}" = train ]; then
        local line="${COMP_LINE#* }"
        local point=$(( COMP_POINT - ${#COMP_LINE} + ${#line} ))
        local choices="$(
            COMP_LINE="$line" COMP_POINT=$point qtorch train -sc query=bash 2>/dev/null
        )"
        COMPREPLY=( $(compgen -W "$choices" -- "$word") )
    fi
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _qtorch qtorch
"""
ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"


def main(argv: Sequence[str]) -> int:
    """Print the script of a shell."""
    shell = argv[0]
    if len(argv) > 1 or shell not in ("bash", "zsh"):
        raise ConfigError(unknown_name_message("shell", " ".join(argv), ("bash", "zsh")))
    print((ZSH if shell == "zsh" else "") + BASH.replace("@COMMANDS@", " ".join(COMMANDS)), end="")
    return 0
