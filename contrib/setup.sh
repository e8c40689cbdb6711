# shellcheck shell=sh
# What demo.sh and test.sh share: system packages, /dev/fuse, a virtual environment with qedfs in it.
#
# Sourced, with `root` set to the checkout. Every step looks first and does nothing when nothing is missing,
# so that a second run costs a few hundredths of a second.

case ${QEDFS_VENV:=$root/.venv} in
    /*) venv=$QEDFS_VENV ;;
    *) venv=$PWD/$QEDFS_VENV ;;
esac
me=$(basename -- "$0")

die() {
    printf '%s: %s\n' "$me" "$*" >&2
    exit 1
}

section() {
    printf '\n== %s\n' "$*"
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "neither root nor sudo: ask an administrator to run: $*"
    fi
}

# Update the package lists, at most once in a run.
update_lists() {
    [ -z "${lists_updated:-}" ] || return 0
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q update </dev/null || die "apt-get update failed"
    lists_updated=yes
}

# need_packages NAME...: install those Debian packages that are not installed.
need_packages() {
    if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
        printf '%s: not Debian or Ubuntu; taken to be installed: %s\n' "$me" "$*"
        return 0
    fi
    # dpkg-query fails when it does not know a name; what it prints about the others is still right.
    installed=" $(dpkg-query -W -f '${db:Status-Abbrev}${Package}\n' "$@" 2>/dev/null | sed -n 's/^.i *//p' | tr '\n' ' ')"
    missing=
    for package in "$@"; do
        case $installed in
            *" $package "*) ;;
            *) missing="$missing $package" ;;
        esac
    done
    [ -n "$missing" ] || return 0
    section "Installing:$missing"
    update_lists
    # shellcheck disable=SC2086  # a list of package names
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -q -y -o Dpkg::Use-Pty=0 install --no-install-recommends $missing </dev/null || die "apt-get install failed"
}

# A container often has no /dev/fuse although its kernel has FUSE.
need_fuse_device() {
    if [ ! -e /dev/fuse ]; then
        printf '%s: no /dev/fuse: making it (mknod /dev/fuse c 10 229)\n' "$me"
        # 10:229 is FUSE's number on every Linux (Documentation/admin-guide/devices.txt).
        as_root mknod -m 666 /dev/fuse c 10 229 || die "cannot make /dev/fuse: start the container with --device /dev/fuse"
    fi
    # Opening it loads the module where that is possible; in a container the device may still be forbidden.
    (: <>/dev/fuse) 2>/dev/null ||
        die "cannot open /dev/fuse: no FUSE in this kernel, or a container without --device /dev/fuse --cap-add SYS_ADMIN"
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Print the first Python that is recent enough; $PYTHON goes first.
find_python() {
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if is_recent "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# Make the virtual environment unless it is there and works.
need_venv() {
    [ ! -x "$venv/bin/python" ] || ! is_recent "$venv/bin/python" || return 0
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        die "$venv: exists and is not a virtual environment (QEDFS_VENV names another place)"
    fi
    command -v python3 >/dev/null || need_packages python3
    python=$(find_python) || die "Python 3.11 or newer is needed (PYTHON names one); Debian 12 and Ubuntu 24.04 have it"
    # A Python that is not Debian's (pyenv, conda) brings headers and venv along; Debian's has them in packages of its own.
    prefix=python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    extra=
    "$python" -c 'import ensurepip, venv' 2>/dev/null || extra=$prefix-venv
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || extra="$extra $prefix-dev"
    # shellcheck disable=SC2086  # a list of package names
    [ -z "$extra" ] || need_packages $extra
    section "Making the virtual environment $venv with $python"
    "$python" -m venv --clear "$venv" || die "cannot make the virtual environment $venv"
}

# need_node_tools NAME@VERSION...: install programs of npm's into a folder of the virtual environment, unless they are there.
need_node_tools() {
    [ "$(cat "$venv/node/.installed" 2>/dev/null)" != "$*" ] || return 0
    command -v npm >/dev/null || need_packages nodejs npm
    section "Installing: $*"
    mkdir -p "$venv/node"
    npm install --prefix "$venv/node" --no-audit --no-fund --no-save --ignore-scripts --loglevel=error "$@" ||
        die "npm install failed: $*"
    echo "$*" >"$venv/node/.installed"
}

# need_qedfs [EXTRA]: install qedfs and what it needs, editable, so that only a change of its requirements asks for
# another installation. The stamp is written last: an interrupted installation is done again.
need_qedfs() {
    stamp=$venv/qedfs-installed
    state=$(cd "$root" && printf '%s ' "$root" && cat setup.cfg pyproject.toml | sha256sum)
    for done_for in "${1:-}" test; do
        [ "$(cat "$stamp" 2>/dev/null)" != "$state $done_for" ] || return 0
    done
    section "Installing qedfs${1:+ and its $1 tools} into $venv"
    # pip builds pyfuse3 from source, so these are needed only here.
    need_packages gcc libc6-dev pkg-config libfuse3-dev
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root${1:+[$1]}" </dev/null ||
        die "pip could not install qedfs"
    printf '%s\n' "$state ${1:-}" >"$stamp"
}
