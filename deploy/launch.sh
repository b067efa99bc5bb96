#!/bin/sh
# Starts internvld in a layout of deploy/layouts/, ranks placed as it says: tensor shards inside a host, pipeline
# stages across.
#
#   sh deploy/launch.sh LAYOUT [--hosts A,B,…] [--network NETWORK] [--agent PROGRAM] [--print] -- --model DIR [OPTION]...
#
#   LAYOUT     a name (two-by-eight) or a file of lines `ranks=N N …` (on each host, in order), `options=…`
#              (of internvld) and `bind=none|socket`
#   --hosts    names or addresses in the order of ranks. In a Slurm job the job's hosts, else this one
#   --network  the interface or the network (10.1.0.0/16) between the hosts; the default is any
#   --agent    what reaches the other hosts [ssh]
#   --print    print the command and exit
#
# Becomes mpirun, or srun in a Slurm job; internvld's --map shows where the ranks are. Under deploy/supervise.sh:
#   sh deploy/supervise.sh --port-file F -- sh deploy/launch.sh two-by-eight --hosts a,b -- --model DIR --port-file F
# The program is $INTERNVLD, else internvld on PATH, else the one in build/release.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
fail() {
    printf 'launch: %s\n' "$*" >&2
    exit 2
}

[ $# -gt 0 ] || fail "a layout is needed: $(cd "$here/layouts" && echo *.layout | sed 's/\.layout//g') (--help)"
case "$1" in
-h | --help)
    sed -n '2,19s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
layout=$1
shift
hosts='' network='' agent='' print=0
while [ $# -gt 0 ]; do
    case "$1" in
    --hosts) hosts=$2 && shift ;;
    --network) network=$2 && shift ;;
    --agent) agent=$2 && shift ;;
    --print) print=1 ;;
    --)
        shift
        break
        ;;
    *) fail "unknown option $1 (internvld's own come after --)" ;;
    esac
    shift
done

[ -f "$layout" ] || layout=$here/layouts/$layout.layout
[ -f "$layout" ] || fail "no such layout: $layout"
value() { sed -n "s/^$1=//p" "$layout"; }
ranks=$(value ranks) options=$(value options) bind=$(value bind)
program=${INTERNVLD:-$(command -v internvld || echo "$here/../build/release/daemon/internvld")}

if [ -n "$hosts" ]; then
    hosts=$(echo "$hosts" | tr ',' ' ')
elif [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
else
    hosts=localhost
fi

# host:ranks pairs, and the ranks in all
world=0 mpi_hosts='' one_a_line='' n_hosts=0
# shellcheck disable=SC2086 # lists of words
set_hosts() { # HOST... , with $ranks in step
    for n in $ranks; do
        [ $# -gt 0 ] || fail "$(basename "$layout") needs $(echo $ranks | wc -w) hosts, there are fewer: $hosts"
        mpi_hosts=${mpi_hosts:+$mpi_hosts,}$1:$n
        world=$((world + n)) n_hosts=$((n_hosts + 1))
        i=0
        while [ $i -lt "$n" ]; do
            one_a_line="$one_a_line$1
"
            i=$((i + 1))
        done
        shift
    done
}
# shellcheck disable=SC2086
set_hosts $hosts

if [ -n "${SLURM_JOB_ID:-}" ]; then
    # Slurm places ranks by a file of one host a rank.
    SLURM_HOSTFILE=$(mktemp)
    export SLURM_HOSTFILE
    printf '%s' "$one_a_line" >"$SLURM_HOSTFILE"
    set -- "$program" "$@"
    # shellcheck disable=SC2086
    set -- "$@" $options
    set -- srun --mpi=pmix --distribution=arbitrary --ntasks="$world" --kill-on-bad-exit=1 --overcommit "$@"
else
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    # shellcheck disable=SC2086
    set -- "$program" "$@" $options
    if [ "$bind" = socket ]; then
        set -- --map-by socket --bind-to socket:overload-allowed "$@"
    else
        set -- --map-by slot --bind-to none "$@"
    fi
    if [ $n_hosts = 1 ]; then
        # Tensors through shared memory, mpirun's own talk over loopback.
        set -- --mca btl self,vader --mca oob_tcp_if_include lo "$@"
    else
        set -- --mca btl self,vader,tcp "$@"
        # An orted may stay for ever when its ranks have ended, as mpirun may (deploy/supervise.sh).
        set -- --mca orte_leave_session_attached 1 \
            --mca orte_launch_agent "sh $here/supervise.sh --once --end-limit 20 -- orted" "$@"
        [ -z "$network" ] || set -- --mca btl_tcp_if_include "$network" --mca oob_tcp_if_include "$network" "$@"
    fi
    [ -z "$agent" ] || set -- --mca plm_rsh_agent "$agent" "$@"
    # Waiting ranks give way where cores are few; containers forbid a process to read another's memory.
    set -- mpirun --oversubscribe --host "$mpi_hosts" -n "$world" --mca mpi_yield_when_idle 1 \
        --mca btl_vader_single_copy_mechanism none "$@"
fi

if [ $print = 1 ]; then
    echo "$@"
    exit 0
fi
exec "$@"
