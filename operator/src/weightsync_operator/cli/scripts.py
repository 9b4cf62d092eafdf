"""What makes shells complete ``weightsync``: each asks the command itself."""

from typing import Final

COMPLETION: Final = {
    "bash": """\
_weightsync() {
    COMPREPLY=()
    local line
    while IFS= read -r line; do COMPREPLY+=("$line"); done < <(
        weightsync __complete "${COMP_WORDS[@]:1:$COMP_CWORD}" 2>/dev/null
    )
}
complete -F _weightsync weightsync
""",
    "zsh": """\
#compdef weightsync
_weightsync() {
    local -a found
    found=("${(@f)$(weightsync __complete "${(@)words[2,$CURRENT]}" 2>/dev/null)}")
    compadd -- $found
}
compdef _weightsync weightsync
""",
    "fish": """\
complete -c weightsync -f -a '(weightsync __complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
""",
}
