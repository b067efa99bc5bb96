#!/bin/sh
# Makes a manual page: TEMPLATE with @OPTIONS@ and the like replaced by what PROGRAM's own --help says, so that an
# option is described in one place. Run by the build.
#
#   sh deploy/man/pages.sh internvld|internvl TEMPLATE PROGRAM VERSION > PAGE
set -eu

kind=$1 template=$2 program=$3 version=$4
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

# Common to the awk programs below: text as roff.
# shellcheck disable=SC2016 # awk's $
roff='function roff(s) { gsub(/\\/, "\\e", s); gsub(/-/, "\\-", s); gsub(/"/, "\\(dq", s); sub(/^[.'"'"']/, "\\\\\\&&", s); return s }'

daemon_parts() {
    "$program" --help >"$made/help"
    awk "$roff"'
        /^Numbers take/ { exit }
        /^[A-Z].*:$/ { sub(/:$/, ""); print ".SS \"" roff($0) "\""; next }
        /^    -/ { print ".TP\n.B \"" roff(substr($0, 5)) "\""; next }
        /^        / { print roff(substr($0, 9)) }' "$made/help" >"$made/OPTIONS"
    awk "$roff"'
        /^Exit status/ { exit }
        in_it && /^    [A-Z]/ { rest = substr($0, 5)
                                n = index(rest, "  "); print ".TP\n.B \"" roff(substr(rest, 1, n - 1)) "\""
                                sub(/^ */, "", rest); $0 = substr(rest, n); sub(/^ */, ""); print roff($0); next }
        in_it && /[^ ]/ { sub(/^ */, ""); print roff($0) }
        /^Environment:/ { in_it = 1 }' "$made/help" >"$made/ENVIRONMENT"
}

# Commands with their own words; each option once, with the commands that take it.
client_parts() {
    "$program" --help >"$made/help"
    sed -n 's/^  \([a-z][a-z]*\)  .*/\1/p' "$made/help" >"$made/commands"
    n_commands=$(wc -l <"$made/commands")
    while read -r command; do
        "$program" "$command" --help | awk -v command="$command" '{ print command "\t" $0 }'
    done <"$made/commands" >"$made/all"
    awk -F '\t' "$roff"'
        $1 != last { print ".SS \"" roff(substr($2, 8)) "\"\n.nf"; last = $1; in_options = 0; next }
        $2 ~ /^  --/ { if (!in_options++) print ".fi" }
        !in_options && $2 == "" { print ".sp"; next }
        !in_options { print roff($2) }' "$made/all" >"$made/COMMANDS"
    awk -F '\t' -v n_commands="$n_commands" "$roff"'
        $2 !~ /^  --/ { next }
        {
            line = substr($2, 3)
            match(line, /^--[a-z-]*( [^ ]+)?/)
            left = substr(line, 1, RLENGTH)
            help = substr(line, RLENGTH + 1)
            sub(/^ +/, "", help)
            if (!(left in text)) { order[++n] = left; text[left] = help }
            used[left] = used[left] (used[left] ? ", " : "") $1
            count[left]++
        }
        END {
            for (i = 1; i <= n; i++) {
                left = order[i]
                print ".TP\n.B \"" roff(left) "\"\n" roff(text[left]) "."
                print count[left] == n_commands ? "Of every command." : "Of: " used[left] "."
            }
        }' "$made/all" >"$made/OPTIONS"
}

case "$kind" in
internvld) daemon_parts ;;
internvl) client_parts ;;
*) exit 2 ;;
esac
sed -e "s/@VERSION@/$version/" -e "/^@OPTIONS@\$/{r $made/OPTIONS" -e 'd}' -e "/^@COMMANDS@\$/{r $made/COMMANDS" -e 'd}' \
    -e "/^@ENVIRONMENT@\$/{r $made/ENVIRONMENT" -e 'd}' "$template"
