"""``moedist completion``: what a shell needs to complete commands, flags, parts and keys."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

EXAMPLES = """\
examples:
  # bash, for good
  moedist completion bash > ~/.local/share/bash-completion/completions/moedist

  # zsh, for good: into a folder of your fpath, and then: autoload -Uz compinit && compinit
  moedist completion zsh > ~/.zfunc/_moedist

  # in this shell only
  source <(moedist completion bash)

It completes commands, flags, moe/router=topk, train.precision=bf16 and every other key, from a list made now: call it
again after an update.
"""

BASH = """\
# Completion of moedist for bash; written by `moedist completion bash`.
_moedist() {
    local line="${COMP_LINE:0:COMP_POINT}" path="" before="" word
    local -a typed
    read -ra typed <<<"$line"
    # readline cuts words at = too: the piece that a space ends is what counts
    local current="${typed[-1]}"
    [[ $line != *[[:space:]] ]] || current=""
    for word in "${typed[@]:1}"; do
        [[ $word != "$current" ]] || break
        before="$word"
        case "${path:+$path }$word" in
            @PATHS@) path="${path:+$path }$word" ;;
        esac
    done
    local candidates
    case "$path $before" in
@OPTIONS@
        *)
            case "$path" in
@WORDS@
            esac
            case "$path" in
                @CONFIGURED@)
                    case "$current" in
@VALUES@
                        [a-z+~]*) candidates+=" $_moedist_keys" ;;
                    esac ;;
            esac ;;
    esac
    local IFS=$' \\t\\n'
    COMPREPLY=($(compgen -W "$candidates" -- "$current"))
    [[ ${#COMPREPLY[@]} -ne 1 || ${COMPREPLY[0]} != *= ]] || compopt -o nospace
    local cut="${current%"${current##*[=:]}"}"
    COMPREPLY=("${COMPREPLY[@]#"$cut"}")
}
_moedist_keys="@KEYS@"
complete -o default -F _moedist moedist
"""

ZSH = """\
#compdef moedist
# Completion of moedist for zsh; written by `moedist completion zsh`.
_moedist() {
    local current="${words[CURRENT]}" word_path="" before="${words[CURRENT-1]}" word
    for word in "${(@)words[2,CURRENT-1]}"; do
        case "${word_path:+$word_path }$word" in
            @PATHS@) word_path="${word_path:+$word_path }$word" ;;
        esac
    done
    local candidates
    case "$word_path $before" in
@OPTIONS@
        *)
            case "$word_path" in
@WORDS@
            esac
            case "$word_path" in
                @CONFIGURED@)
                    case "$current" in
@VALUES@
                        [a-z+~]*) candidates+=" @KEYS@" ;;
                    esac ;;
            esac ;;
    esac
    local -a ended open
    ended=(${${=candidates}:#*=})
    open=(${(M)${=candidates}:#*=})
    compadd -- $ended
    compadd -S '' -- $open
    (( compstate[nmatches] )) || _files
}
if [[ $funcstack[1] == _moedist ]]; then _moedist "$@"; else compdef _moedist moedist; fi
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command to ``moedist``'s parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "completion",
        help="print a completion script for a shell",
        description="Prints a script that lets a shell complete moedist's commands, flags, parts and keys.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=["bash", "zsh"], help="whose script to print")
    return parser


def main(args: argparse.Namespace) -> int:
    """Prints the script; returns the exit code."""
    from moedist.cli.main import build_parser
    from moedist.launch.keys import list_groups, list_keys

    print(write_script({"bash": BASH, "zsh": ZSH}[args.shell], build_parser(), list_groups(), list_keys()), end="")
    return 0


def write_script(
    template: str,
    parser: argparse.ArgumentParser,
    groups: Mapping[str, Sequence[str]],
    keys: Mapping[str, Sequence[str]],
) -> str:
    """A shell's script.

    Args:
        template: with a place for each part, ``@NAME@``.
        parser: of all commands.
        groups: what ``group=`` can pick.
        keys: what ``key=`` can be; none where it is any value.
    """
    commands = dict(walk(parser))
    configured = [path for path, command in commands.items() if takes_overrides(command)]
    options = {
        f"{path} {flag}": [str(choice) for choice in action.choices]
        for path, command in commands.items()
        for action in command._actions
        for flag in action.option_strings
        if action.choices
    }
    values = {name: choices for name, choices in {**keys, **groups}.items() if choices}
    parts = {
        "PATHS": "|".join(shlex.quote(path) for path in commands if path),
        "OPTIONS": cases(options, indent=8),
        "WORDS": cases({path: words_of(command) for path, command in commands.items()}, indent=16),
        "CONFIGURED": "|".join(map(shlex.quote, configured)),
        "VALUES": cases(
            {f"{name}=": [f"{name}={value}" for value in choices] for name, choices in values.items()},
            indent=24,
            anything_after=True,
        ),
        "KEYS": " ".join(f"{name}=" for name in sorted({*groups, *keys})),
    }
    for name, text in parts.items():
        template = template.replace(f"@{name}@", text)
    return template


def walk(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command by its words (``checkpoint inspect``), the program itself as the empty one."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from walk(command, f"{path} {name}".strip())


def takes_overrides(parser: argparse.ArgumentParser) -> bool:
    """Whether ``key=value`` may stand behind a command."""
    return any(action.dest == "overrides" for action in parser._actions)


def words_of(parser: argparse.ArgumentParser) -> list[str]:
    """Flags, and what a positional argument can be: its choices, or what a command says of it (``words``)."""
    words: list[str] = [*(parser.get_default("words") or ())]
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            words += action.option_strings or [str(choice) for choice in action.choices or ()]
    return words


def cases(table: Mapping[str, Sequence[str]], *, indent: int, anything_after: bool = False) -> str:
    """Branches of a shell's ``case``, one for each row."""
    star = "*" if anything_after else ""
    return "\n".join(
        f"{' ' * indent}{shlex.quote(pattern)}{star}) candidates={shlex.quote(' '.join(words))} ;;"
        for pattern, words in table.items()
    )
