# Sourced by the examples that run on a laptop, with `root` set to the repository:
#
#     workspace DEFAULT    the environment, the repository as current folder, and `work`, the folder of all that is
#                          written: MEGAYOCO_RUN_DIR, from where the example was called, or else DEFAULT
#     show COMMAND ...     prints a command and runs it
#     free_port            a port that nobody listens on, so that two examples can run side by side
#
# shellcheck shell=bash disable=SC2154

# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"

workspace() {
    work="${MEGAYOCO_RUN_DIR:-$root/$1}"
    case "$work" in /*) ;; *) work="$(pwd -P)/$work" ;; esac
    megayoco_environment ""
    cd "$root"
    mkdir -p "$work/data"
    export DS_ACCELERATOR=cpu # small processes on a CPU, also where there are GPUs
}

show() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
