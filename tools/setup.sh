#!/usr/bin/env bash
# Installs what the project's chores need, says what it does, and does nothing when nothing is missing.
#
#   tools/setup.sh venv       .venv: the newest fitting Python, constraints/newest.txt, this project editable
#   tools/setup.sh oldest     .venv-oldest: Python 3.11, constraints/oldest.txt, what the unit tests need
#   tools/setup.sh fuzz       atheris into .venv, where there is a build of it for this Python
#   tools/setup.sh servers    containerd, runc, crun and a static busybox, from Debian's packages where root may
#   tools/setup.sh required   as servers, and fails where a real containerd cannot be run
#   tools/setup.sh go         containerd's Go client, from Debian's packages: one test compares what it is answered
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A root shell opened with plain `su` has no sbin in its PATH, and runc lives there.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }
is_root() { [ "$(id -u)" -eq 0 ]; }
has_apt() { [ -e /etc/debian_version ] && command -v apt-get >/dev/null; }

# ---------------------------------------------------------------------------------------------- Debian's packages

apt_updated=no
policy_file=/usr/sbin/policy-rc.d
policy_ours=no

drop_policy() {
    if [ "$policy_ours" = yes ]; then
        rm -f "$policy_file"
        policy_ours=no
    fi
}
trap drop_policy EXIT

# apt_install PACKAGE...: fails, changing nothing, where another package would have to go.
apt_install() {
    local removed
    if [ "$apt_updated" = no ]; then
        say "apt-get update"
        apt-get -qq update || say "apt-get update failed; going on with the package lists at hand"
        apt_updated=yes
    fi
    # busybox-static is the same program linked otherwise and takes busybox's place. Anything else stays.
    removed=$(apt-get -s install --no-install-recommends "$@" 2>/dev/null |
        sed -n 's/^Remv \([^ ]*\).*/\1/p' | grep -vx busybox || true)
    if [ -n "$removed" ]; then
        say "not installing $*: Debian would remove $(echo "$removed" | paste -sd ' ')"
        return 1
    fi
    # The tests run a containerd of their own: the package must not start the system's as it arrives.
    if [ ! -e "$policy_file" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy_file"
        chmod 755 "$policy_file"
        policy_ours=yes
    fi
    say "apt-get install $*"
    local status=0
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "$@" </dev/null >/dev/null || status=$?
    drop_policy
    return "$status"
}

# A busybox that needs a library of the host's would not run in a container that has none.
has_static_busybox() {
    local path
    path=$(command -v busybox) || return 1
    ! ldd "$path" >/dev/null 2>&1
}

missing_servers() {
    command -v containerd >/dev/null || echo containerd
    command -v runc >/dev/null || echo runc
    has_static_busybox || echo busybox-static
}

setup_servers() {
    local required=$1 missing why=""
    # The second runtime has tests of its own; everything else does without.
    if ! command -v crun >/dev/null && is_root && has_apt; then
        apt_install crun || say "apt-get could not install crun; tests that need it are skipped"
    fi
    missing=$(missing_servers | paste -sd ' ')
    if [ -n "$missing" ] && is_root && has_apt; then
        # shellcheck disable=SC2086  # a list of names
        apt_install $missing || say "apt-get could not install $missing"
        missing=$(missing_servers | paste -sd ' ')
    fi
    if [ -n "$missing" ]; then
        why="missing: $missing"
        if ! has_apt; then
            why="$why (not a Debian: install them by your system's means)"
        elif ! is_root; then
            why="$why (as root: apt-get install --no-install-recommends $missing)"
        fi
    fi
    if ! is_root; then
        why="${why:+$why; }not root, and containerd needs root"
    fi
    if [ -z "$why" ]; then
        return 0
    fi
    if [ "$required" = yes ]; then
        die "$why; a real container cannot be run here"
    fi
    say "$why; tests that need a real containerd are skipped"
}

setup_go() {
    local client=/usr/share/gocode/src/github.com/containerd/containerd/client.go
    if command -v go >/dev/null && [ -e "$client" ]; then
        return 0
    fi
    if is_root && has_apt && apt_install golang-go golang-github-containerd-containerd-dev; then
        return 0
    fi
    say "no Go client of containerd (Debian's golang-go and golang-github-containerd-containerd-dev); its test is skipped"
}

# -------------------------------------------------------------------------------------------- virtual environments

# python_fits COMMAND FIRST LAST: a CPython between the versions, which can make a virtual environment.
python_fits() {
    "$1" - "$2" "$3" >/dev/null 2>&1 <<'PY'
import sys
import ensurepip, venv
low, high = (tuple(map(int, bound.split("."))) for bound in sys.argv[1:])
sys.exit(not (sys.implementation.name == "cpython" and low <= sys.version_info[:2] <= high))
PY
}

# find_python FIRST LAST: sets `python` to the newest that fits; as root on Debian, after installing what Debian
# splits off.
find_python() {
    local command attempt
    for attempt in first second; do
        for command in python3.13 python3.12 python3.11 python3; do
            if command -v "$command" >/dev/null && python_fits "$command" "$1" "$2"; then
                python=$command
                return 0
            fi
        done
        if [ "$attempt" = first ] && is_root && has_apt; then
            apt_install python3 python3-venv || return 1
        fi
    done
    return 1
}

# fresh VENV STAMP: whether the environment was made from these very files, in this very place.
fresh() {
    [ -x "$1/bin/python" ] && [ "$(cat "$1/setup-stamp" 2>/dev/null)" = "$2" ]
}

# stamp FILE...: names the state of the files and the place; the editable install points there.
stamp() {
    { pwd; cat "$@"; } | sha256sum | cut -d ' ' -f 1
}

# make_venv VENV PYTHON FIRST LAST: reuses one that works, whoever made it.
make_venv() {
    if python_fits "$1/bin/python" "$3" "$4" && "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        say "reusing $1 ($("$1/bin/python" -V))"
        return 0
    fi
    say "making $1 with $("$2" -V) ($(command -v "$2"))"
    "$2" -m venv --clear "$1"
}

pip_install() {
    local venv=$1
    shift
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

setup_venv() {
    local venv=.venv now
    now=$(stamp pyproject.toml constraints/newest.txt tools/setup.sh)
    if fresh "$venv" "$now"; then
        return 0
    fi
    find_python 3.11 3.99 ||
        die "no Python 3.11 or newer that can make a virtual environment; on Debian: apt-get install python3 python3-venv"
    make_venv "$venv" "$python" 3.11 3.99
    say "installing the pinned packages of constraints/newest.txt and this project into $venv"
    install_pinned "$venv" constraints/newest.txt dev
    echo "$now" >"$venv/setup-stamp"
}

# install_pinned VENV CONSTRAINTS EXTRA: the build backend comes first, pinned like the rest, so the build needs no
# environment of its own.
install_pinned() {
    local venv=$1 pins=$2 extra=$3
    pip_install "$venv" --constraint "$pins" hatchling editables
    pip_install "$venv" --constraint "$pins" --no-build-isolation --editable ".[$extra]"
}

setup_oldest() {
    local venv=.venv-oldest now
    now=$(stamp pyproject.toml constraints/oldest.txt tools/setup.sh)
    if fresh "$venv" "$now"; then
        return 0
    fi
    if ! find_python 3.11 3.11; then
        # grpcio's oldest supported release has ready-made builds for 3.11 and none for later ones.
        [ "${CI:-}" != true ] || die "no Python 3.11, which the oldest supported packages need"
        say "no Python 3.11, which the oldest supported packages need: skipping the tests on them"
        return 0
    fi
    make_venv "$venv" "$python" 3.11 3.11
    say "installing the pinned packages of constraints/oldest.txt and this project into $venv"
    install_pinned "$venv" constraints/oldest.txt test
    echo "$now" >"$venv/setup-stamp"
}

setup_fuzz() {
    if .venv/bin/python -c 'import atheris' 2>/dev/null; then
        return 0
    fi
    say "installing atheris, pinned in constraints/fuzz.txt, into .venv"
    pip_install .venv --only-binary :all: --requirement constraints/fuzz.txt 2>/dev/null ||
        say "there is no atheris for this Python; fuzzing goes on with damaged samples"
}

case "${1:-}" in
    venv) setup_venv ;;
    oldest) setup_oldest ;;
    fuzz) setup_fuzz ;;
    servers) setup_servers no ;;
    required) setup_servers yes ;;
    go) setup_go ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
