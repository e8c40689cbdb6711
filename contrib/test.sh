#!/bin/sh
# Check everything, on a desk as in CI: install what is missing, then format, lint, types and all tests.
#
# Usage: sh contrib/test.sh [argument of pytest]...
# Environment: as for demo.sh. Ends at the first stage that fails.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
. "$root/contrib/setup.sh"

# stage TITLE COMMAND...
stage() {
    title=$1
    shift
    section "$title"
    "$@" || die "failed: $title"
}

versions() {
    printf '%-22s %s\n' kernel "$(uname -r)" cores "$(nproc)" python "$(python -V)"
    python -c 'from importlib.metadata import version
for name in ("pyfuse3", "trio", "numpy", "pytest", "hypothesis"): print(f"{name:22} {version(name)}")'
    for tool in qemu-img qemu-io qemu-nbd qemu-storage-daemon qemu-system-x86_64 nbdkit nbdcopy fio fusermount3 strace; do
        printf '%-22s %s\n' "$tool" "$("$tool" --version 2>&1 | head -n 1)"
    done
}

cd "$root"
# The tests of boots and of libvirt bring their own lists. qemu-system-common has qemu-storage-daemon.
# shellcheck disable=SC2046  # one package a line
need_packages fuse3 attr fio libnbd-bin nginx openssl qemu-system-common shellcheck strace systemd xfsprogs $(cat contrib/boot/packages contrib/libvirt/packages)
# The boot test has apt download a kernel, for which apt must know one.
! command -v apt-cache >/dev/null || apt-cache show busybox-static >/dev/null 2>&1 || update_lists
need_fuse_device
need_venv
need_qedfs test
# Object stores to test with: of S3 another one than Python's moto, and Azure's.
need_node_tools s3rver@3.7.1 azurite@3.37.0
# Tests and tools find this qedfs and this Python; mke2fs is where only root looks.
PATH=$venv/bin:$PATH:/usr/sbin:/sbin
export PATH

stage Versions versions
stage "Shell scripts" shellcheck -x contrib/*.sh contrib/libvirt/qemu .ci/run
stage Format ruff format --check .
stage Lint ruff check .
stage Types mypy
section Tests
# Two at once for each processor: most tests wait for other programs. Last, so that the last line is pytest's own summary.
exec python -m pytest -n "$((2 * $(nproc)))" "$@"
