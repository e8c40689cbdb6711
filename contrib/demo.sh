#!/bin/sh
# Show qedfs at work on this machine: install what is missing, then run `qedfs demo`.
#
# Usage: sh contrib/demo.sh [option of `qedfs demo`]...
# Environment: QEDFS_VENV, where the virtual environment is (default: .venv in the checkout);
#              PYTHON, which interpreter it is made with.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
. "$root/contrib/setup.sh"

need_packages fuse3
need_fuse_device
need_venv
need_qedfs ""
exec "$venv/bin/qedfs" demo "$@"
