# bash completion for internvl and internvld, made from their own --help.
_internvl() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} program=${COMP_WORDS[0]} w command=
    for w in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case $w in -*) ;; *) command=$w && break ;; esac
    done
    case $before in
    --image | --video | --output | --results | --html | --model | --port-file | --token-file | --auth-token-file | --endpoint-file | --csv)
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
        return
        ;;
    esac
    if [[ $word == -* ]]; then
        # shellcheck disable=SC2086 # no word before a command is named
        mapfile -t COMPREPLY < <(compgen -W "$("$program" $command --help 2>/dev/null | sed -n 's/^  *\(--[a-z][a-z-]*\).*/\1/p')" -- "$word")
    elif [[ ${program##*/} == internvl && -z $command ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$("$program" --help | sed -n 's/^  \([a-z][a-z]*\)  .*/\1/p')" -- "$word")
    else
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
    fi
}
complete -o filenames -F _internvl internvl internvld
