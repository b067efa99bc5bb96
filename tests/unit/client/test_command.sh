#!/bin/sh
# The internvl command without a daemon: usage errors are 2 with a hint, failures are 1 with one line, help is 0.
#   test_command.sh PATH-TO-INTERNVL
set -u
internvl=$1
failures=0
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
unset INTERNVL_ADDRESS

# expect STATUS PATTERN ARGUMENT...: exit status, and a pattern in what was said (both streams).
expect() {
    status=$1 pattern=$2
    shift 2
    said=$("$internvl" "$@" 2>&1 </dev/null)
    got=$?
    if [ $got -ne "$status" ] || ! printf '%s\n' "$said" | grep -q -- "$pattern"; then
        printf 'internvl %s: exit %s (expected %s), pattern "%s" in:\n%s\n' "$*" $got "$status" "$pattern" "$said"
        failures=$((failures + 1))
    fi
}

expect 0 '^internvl [0-9]' --version
expect 0 'usage: internvl COMMAND' --help
expect 0 'usage: internvl COMMAND' -h
for command in ask chat forward score embed tokenize upload info evaluate bench; do
    expect 0 "usage: internvl $command" $command --help
    expect 0 '--address HOST:PORT' --help $command
    expect 2 "internvl $command: unknown option '--bogus' (see internvl $command --help)" $command --bogus
done
expect 0 '--temperature X' ask --help
expect 0 '--concurrency N' evaluate --help
expect 2 'no command given'
expect 2 "unknown command 'answer'" answer
expect 2 'no question given' ask
expect 2 'one question is enough' ask a b
expect 2 'option --limit is not one of' ask x --limit 3
expect 2 "option --top-k: '-1' is not a value for N" ask x --top-k -1
expect 2 "option --top-k: '4294967296' is not" ask x --top-k=4294967296
expect 2 "option --top-p: 'x' is not" ask x --top-p x
expect 2 'option --temperature needs a value' ask x --temperature
expect 2 'option --json takes no value' ask x --json=1
expect 2 "unknown option '-x'" ask -x
expect 2 'is not a list of token ids' tokenize --ids 1,,2
expect 2 'is not a list of token ids' tokenize --ids 1,-2
expect 2 'either a text or --ids' tokenize --ids 1 text
expect 2 'not between 1 and 4096' evaluate x.jsonl --concurrency 0

expect 1 'internvl: ask: NOT_FOUND: .*none.png: No such file' ask --image "$directory/none.png" x
expect 1 'internvl: ask: NOT_FOUND: .*: Is a directory' ask --image "$directory" x
expect 1 'internvl: ask: NOT_FOUND: .*token' ask --token-file "$directory/token" x
expect 1 'internvl: ask: UNAVAILABLE: ' --address 127.0.0.1:1 ask x
expect 1 'internvl: ask: UNAVAILABLE: ' ask --address=127.0.0.1:1 -- --question
expect 1 'internvl: info: UNAVAILABLE: ' info --json --address 127.0.0.1:1
expect 1 'internvl: evaluate: NOT_FOUND: ' evaluate "$directory/none.jsonl"
printf '{"answer": "a", "messages": []}\nnot json\n' >"$directory/bad.jsonl"
expect 1 'bad.jsonl:2: not JSON' evaluate "$directory/bad.jsonl"
printf '\n{"messages": []}\n' >"$directory/bad.jsonl"
expect 1 'bad.jsonl:2: "answer" is not a text' evaluate "$directory/bad.jsonl"
printf '\n' >"$directory/bad.jsonl"
expect 1 'holds no question' evaluate "$directory/bad.jsonl"
printf '{"answer": "a", "messages": [{"role": "user", "content": [{"type": "image", "path": "no.png"}]}]}\n' \
    >"$directory/bad.jsonl"
expect 1 'NOT_FOUND: 1 of 1 questions failed, the first with: .*no.png' evaluate "$directory/bad.jsonl"
INTERNVL_ADDRESS=127.0.0.1:1 expect 1 'internvl: tokenize: UNAVAILABLE: ' tokenize x

[ $failures -eq 0 ] && echo "command: ok"
exit $failures
