#!/usr/bin/env bash
# A Ray cluster by hand: start this machine as head or worker, look at it, submit to it, end what was started here.
# What runs is recorded in ${QARL_CLUSTER_DIR:-~/.qarl/cluster}/NAME; `down` ends those processes and no others.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/cluster/ray_cluster.sh COMMAND

  head   [--port 6379] [--dashboard-port 8265] [--dashboard-host 127.0.0.1]    start this machine as the head
         [--num-cpus N] [--num-gpus N] [--temp-dir DIR] [--name head] [-- RAY START OPTIONS]
  worker --address HOST:PORT                                                   join this machine to a head
         [--num-cpus N] [--num-gpus N] [--temp-dir DIR] [--name worker] [-- RAY START OPTIONS]
  submit CONFIG [key=value ...] [--address http://HOST:8265] [--no-wait]       train CONFIG on the cluster
  status [--address HOST:PORT]                                                 nodes and resources
  down   [--name NAME]                                                         end what was started here

Nodes hold this tree and its .venv, or the environment of an installed qarl, at the same path. The cluster
authenticates with a token (~/.ray/auth_token, or RAY_AUTH_TOKEN_PATH, or RAY_AUTH_TOKEN);
RAY_AUTH_MODE=disabled turns that off.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=$root/.venv/bin
# An installed package has no .venv beside it.
if [ ! -e "$root/.venv" ] && ray=$(command -v ray); then bin=$(dirname "$ray"); fi
ray=$bin/ray
state=${QARL_CLUSTER_DIR:-$HOME/.qarl/cluster}
start_timeout_s=120

say() { echo "ray_cluster: $*"; }
die() {
    echo "ray_cluster: $1" >&2
    exit "${2:-1}"
}
misuse() { die "$1; '$0 --help' shows the usage" 2; }

check_installed() {
    [ ! -x "$ray" ] || return 0
    [ ! -e "$root/.venv" ] || die "Ray is not installed in $root/.venv; run 'make setup'"
    die "no Ray in PATH, and no $root/.venv; run 'make setup', or activate the environment that qarl is installed in"
}

answers() { # HOST:PORT
    timeout 5 bash -c "exec 3<>/dev/tcp/${1%:*}/${1##*:}" 2>/dev/null
}

use_token() {
    export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
    token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
}

lacks_token() { [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "$token_file" ]; }

# --- nodes started here: the file $state/NAME/node holds pid, mark, address and (of a head) dashboard ---------------

recorded() { # names of the nodes started here, newest first: a worker whose head has gone is slow to end
    local file
    # shellcheck disable=SC2012
    { ls -t "$state"/*/node 2>/dev/null || true; } | while read -r file; do basename "$(dirname "$file")"; done
}

field() { sed -n "s/^$1=//p" "$state/$2/node"; } # FIELD NAME

recorded_field() { # FIELD: its first value among the nodes started here
    local name
    for name in $(recorded); do field "$1" "$name"; done | sed -n 1p
}

members() { # NAME: pids of the node, which are those that inherited its mark, and the session of `ray start`
    local marked
    marked=$(grep -lzxF "QARL_NODE_MARK=$(field mark "$1")" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3) || true
    # Ray's workers overwrite their environment: the session finds them. But without any marked process the recorded
    # pid may be somebody else's by now.
    [ -z "$marked" ] || { echo "$marked" && ps -o pid= -s "$(field pid "$1")" | tr -d ' '; } | sort -u
}

stop_node() { # NAME: ends it, by force what is left after 20 s
    local pid left tries
    pid=$(members "$1" | grep -x "$(field pid "$1")") && kill -TERM "$pid" 2>/dev/null || true
    for ((tries = 0; tries < 40; tries++)); do
        left=$(members "$1")
        [ -n "$left" ] || break
        sleep 0.5
    done
    # shellcheck disable=SC2086
    [ -z "$left" ] || kill -KILL $left 2>/dev/null || true
    rm "$state/$1/node"
}

start_node() { # NAME PROBE RAY-START-ARGS...: runs `ray start` in a session of its own until it and PROBE answer
    local name=$1 probe=$2 dir=$state/$1 mark pid tries
    shift 2
    mkdir -p "$dir"
    if [ -f "$dir/node" ]; then
        [ -z "$(members "$name")" ] || die "'$name' runs already; end it with 'down --name $name' or choose another --name"
        rm "$dir/node"
    fi
    : >"$dir/log"
    mark=$dir:$$:$RANDOM
    # Ports for Ray's own workers are chosen freely, so that two nodes fit on one machine. Without a drain time-out of
    # zero Ray waits 30 s for running jobs before it ends.
    QARL_NODE_MARK=$mark RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-0} \
        setsid "$ray" start --block --disable-usage-stats --log-color false \
        --min-worker-port 0 --max-worker-port 0 --dashboard-agent-listen-port 0 "$@" \
        </dev/null >"$dir/log" 2>&1 &
    pid=$!
    printf '%s=%s\n' pid "$pid" mark "$mark" >"$dir/node"
    for ((tries = 0; tries < 2 * start_timeout_s; tries++)); do
        if grep -q "Ray runtime started" "$dir/log" && { [ -z "$probe" ] || answers "$probe"; }; then
            return
        fi
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.5
    done
    stop_node "$name"
    tail -n 3 "$dir/log" >&2
    die "'$name' did not start, its last lines are above; the whole log is $dir/log"
}

# --- commands -----------------------------------------------------------------------------------------------------

parse() { # OPTIONS-ALLOWED ARGS...: sets the variables of the same names, and `rest` to what follows --
    local allowed=" $1 " option
    shift
    rest=()
    while [ $# -gt 0 ]; do
        if [ "$1" = -- ]; then
            [[ $allowed == *" -- "* ]] || misuse "unknown argument '--'"
            rest=("${@:2}")
            return
        fi
        [[ $allowed == *" $1 "* ]] || misuse "unknown argument '$1'"
        [ $# -ge 2 ] || misuse "$1 needs a value"
        option=${1#--}
        printf -v "${option//-/_}" '%s' "$2"
        shift 2
    done
}

check_common() {
    local value
    for value in "$num_cpus" "$num_gpus" "$port" "$dashboard_port"; do
        [[ $value =~ ^[0-9]*$ ]] || misuse "'$value' is not a whole number"
    done
    [[ $name =~ ^[A-Za-z0-9_.-]+$ ]] || misuse "--name '$name' may hold letters, digits, '_', '.' and '-' only"
    check_installed
    use_token
    [ "$RAY_AUTH_MODE" = token ] || say "RAY_AUTH_MODE=$RAY_AUTH_MODE: whoever reaches the ports can run code here"
    options=(${num_cpus:+--num-cpus "$num_cpus"} ${num_gpus:+--num-gpus "$num_gpus"}
        ${temp_dir:+--temp-dir "$temp_dir"} "${rest[@]}")
}

cmd_head() {
    local name=head port=6379 dashboard_port=8265 dashboard_host=127.0.0.1 num_cpus="" num_gpus="" temp_dir="" rest options
    parse "--name --port --dashboard-port --dashboard-host --num-cpus --num-gpus --temp-dir --" "$@"
    check_common
    if answers "127.0.0.1:$port"; then die "port $port is taken; choose another --port"; fi
    if answers "127.0.0.1:$dashboard_port"; then die "port $dashboard_port is taken; choose another --dashboard-port"; fi
    # Left alone, `ray start` runs without authentication when no token exists yet.
    if lacks_token; then (umask 077 && "$ray" get-auth-token --generate >/dev/null 2>&1) || true; fi
    if lacks_token; then die "no token at $token_file, and none could be written there"; fi
    say "starting the head (about 10 s)"
    start_node "$name" "127.0.0.1:$dashboard_port" --head --port "$port" --include-dashboard true \
        --dashboard-host "$dashboard_host" --dashboard-port "$dashboard_port" "${options[@]}"
    local address dashboard=http://127.0.0.1:$dashboard_port
    address=$(sed -n "s/.*ray start --address='\([^']*\)'.*/\1/p" "$state/$name/log")
    [ -n "$address" ] || die "no address found in $state/$name/log"
    printf '%s=%s\n' address "$address" dashboard "$dashboard" >>"$state/$name/node"
    say "head answers at $address, jobs and dashboard at $dashboard"
    if [ -n "${RAY_AUTH_TOKEN:-}" ]; then
        say "on each worker export the same RAY_AUTH_TOKEN, then run:"
    elif [ "$RAY_AUTH_MODE" = token ]; then
        say "on each worker put a copy of $token_file at ~/.ray/auth_token (mode 600), then run:"
    else
        say "on each worker run:"
    fi
    echo "  $0 worker --address $address"
}

cmd_worker() {
    local name=worker address="" port="" dashboard_port="" num_cpus="" num_gpus="" temp_dir="" rest options
    parse "--name --address --num-cpus --num-gpus --temp-dir --" "$@"
    [ -n "$address" ] || misuse "worker needs --address HOST:PORT, as the head printed it"
    [[ $address =~ ^[^:/]+:[0-9]+$ ]] || misuse "--address '$address' is not HOST:PORT"
    check_common
    if lacks_token; then die "no token at $token_file; copy the head's there (mode 600)"; fi
    answers "$address" || die "no head answers at $address; check the address, the port and the firewall"
    say "joining $address (about 10 s)"
    start_node "$name" "" --address "$address" "${options[@]}"
    echo "address=$address" >>"$state/$name/node"
    say "worker '$name' joined $address"
}

cmd_submit() {
    [ $# -ge 1 ] && [[ $1 != -* ]] || misuse "submit needs a CONFIG file"
    check_installed
    use_token
    local dashboard
    dashboard=$(recorded_field dashboard)
    [[ " $* " == *" --address"* ]] || set -- "$@" --address "${dashboard:-http://127.0.0.1:8265}"
    exec "$bin/qarl" submit "$@"
}

cmd_status() {
    local address="" rest name output
    parse "--address" "$@"
    for name in $(recorded); do
        if [ -n "$(members "$name")" ]; then say "'$name' runs here"; else say "'$name' was started here and has died"; fi
    done
    address=${address:-$(recorded_field address)}
    [ -n "$address" ] || die "no cluster was started here; give --address HOST:PORT"
    answers "$address" || die "no head answers at $address"
    check_installed
    use_token
    if ! output=$(timeout 30 "$ray" status --address "$address" 2>&1); then
        tail -n 1 <<<"$output" >&2
        die "no status from $address within 30 s; is this machine's token the head's?"
    fi
    echo "$output"
}

cmd_down() {
    local name="" rest names
    parse "--name" "$@"
    names=$(recorded)
    if [ -n "$name" ]; then
        [ -f "$state/$name/node" ] || die "no node '$name' was started here"
        names=$name
    fi
    [ -n "$names" ] || say "nothing was started here"
    for name in $names; do
        stop_node "$name"
        say "'$name' ended"
    done
}

case ${1:-} in
    head | worker | submit | status | down) "cmd_$1" "${@:2}" ;;
    -h | --help) usage ;;
    "") misuse "a command is missing: head, worker, submit, status or down" ;;
    *) misuse "unknown command '$1'" ;;
esac
