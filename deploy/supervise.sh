#!/bin/sh
# Keeps a job running: starts COMMAND (mpirun …, srun …, or internvld alone), and starts it again when it fails.
#
#   sh deploy/supervise.sh [--once] [--port-file FILE] [--start-limit SECONDS] [--end-limit SECONDS] [--]
#                          COMMAND [ARGUMENT]...
#
#   SIGTERM, SIGINT, SIGHUP, SIGUSR1   the first drains the job (SIGUSR1 to COMMAND: mpirun and srun hand it to
#                                      every rank at once, where SIGTERM would end them), the second ends it
#   exit status                        0 after a drain; COMMAND's when it was a wrong command line (2) or --once
#   --once                             no restart: for systemd and Slurm, which have their own
#   --start-limit SECONDS              kill a start that has not written --port-file FILE by then [600]
#   --end-limit SECONDS                kill COMMAND that long after its last rank here [1, in a drain 4, and 0.5 where the
#                                      last rank left FILE, which a daemon that has drained takes away]
#
# mpirun cannot be left alone: when the link to a host is dead it waits for that host for ever, though all of its
# ranks here have ended; so it does now and then when a rank died while it came up (parallel/launch_mpirun.c). So when
# COMMAND has had ranks here and has none any more, it is killed after --end-limit. (orted on the other hosts likewise:
# deploy/launch.sh starts it under this script.)
# A job that fails soon after its start is started again after 1, 2, 4 … 60 seconds.
set -u

say() { printf 'supervise: %s\n' "$*" >&2; }

once=0 port_file='' start_limit=600 end_limit=
while [ $# -gt 0 ]; do
    case "$1" in
    --once) once=1 ;;
    --port-file) port_file=$2 && shift ;;
    --start-limit) start_limit=$2 && shift ;;
    --end-limit) end_limit=$2 && shift ;;
    -h | --help)
        sed -n '2,21s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    --)
        shift
        break
        ;;
    -*)
        say "unknown option $1"
        exit 2
        ;;
    *) break ;;
    esac
    shift
done
if [ $# = 0 ]; then
    say "a command is needed (--help)"
    exit 2
fi

child=0 n_asked=0
ask() {
    n_asked=$((n_asked + 1))
    [ "$child" = 0 ] && return
    if [ $n_asked = 1 ]; then
        say "draining (once more to end the job at once)"
        kill -USR1 "$child" 2>/dev/null
    else
        say "ending the job"
        kill -TERM "$child" 2>/dev/null
    fi
}
trap ask TERM INT HUP USR1

# These ask /proc twice a second, and start no program where the shell itself can read.
now() { # in hundredths of a second
    read -r uptime _ </proc/uptime
    now=${uptime%.*}${uptime#*.}
}
trap : CHLD
nap() { # less when a signal comes, or COMMAND ends
    sleep "$1" &
    sleeper=$!
    wait $sleeper 2>/dev/null
    kill $sleeper 2>/dev/null && wait $sleeper 2>/dev/null
}

is_alive() { # a zombie is not
    { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
    stat=${stat##*) }
    [ "${stat%% *}" != Z ]
}
has_ranks() { # of mpirun, on this host; a zombie's environment is empty
    for pid in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
        grep -qsa 'OMPI_COMM_WORLD_RANK=' "/proc/$pid/environ" && return 0
    done
    return 1
}

# For COMMAND to end by itself when its ranks have ended, in hundredths of a second.
set_patience() {
    if [ -n "$end_limit" ]; then
        patience=$((100 * end_limit))
    elif [ -n "$port_file" ] && [ -s "$port_file" ]; then
        patience=50 # a rank was lost
    elif [ $n_asked -gt 0 ]; then
        patience=400
    else
        patience=100
    fi
}

# Until COMMAND ends; ends it itself where it would not. Sets `status`.
watch() {
    had_ranks=0 empty_since='' started=$now is_ready=0
    while is_alive "$child"; do
        now
        look=0.5
        if has_ranks "$child"; then
            had_ranks=1 empty_since=''
        elif [ $had_ranks = 1 ]; then
            look=0.1
            : "${empty_since:=$now}"
            set_patience
            if [ $((now - empty_since)) -ge $patience ]; then
                say "$command_name has no rank left here and does not end (a host that cannot be reached?): killing it"
                kill -KILL "$child" 2>/dev/null
            fi
        fi
        if [ -n "$port_file" ] && [ $is_ready = 0 ]; then
            if [ -s "$port_file" ]; then
                is_ready=1
            elif [ $((now - started)) -gt $((100 * start_limit)) ]; then
                say "not ready after $start_limit s: killing $command_name"
                kill -KILL "$child" 2>/dev/null
            fi
        fi
        nap $look
    done
    wait "$child"
    status=$?
    child=0
}

command_name=$(basename "$1") delay=1
while :; do
    now
    began=$now
    [ -z "$port_file" ] || rm -f "$port_file"
    # Its own session: the terminal's Ctrl-C comes to us alone.
    setsid "$@" &
    child=$!
    [ $n_asked = 0 ] || kill -USR1 "$child" 2>/dev/null
    watch
    [ $status != 0 ] && [ -n "$port_file" ] && rm -f "$port_file"
    if [ $once = 1 ]; then
        exit $status
    fi
    if [ $status = 0 ] || [ $n_asked -gt 0 ]; then
        say "$command_name ended with $status"
        exit $status
    fi
    if [ $status = 2 ]; then
        say "$command_name refused its command line"
        exit 2
    fi
    now
    [ $((now - began)) -gt 6000 ] && delay=1
    say "$command_name ended with $status after $(((now - began) / 100)) s: starting it again in $delay s"
    nap $delay
    [ $n_asked -gt 0 ] && exit $status
    delay=$((delay * 2))
    [ $delay -gt 60 ] && delay=60
done
