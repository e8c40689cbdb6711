#!/bin/sh
# Fuzz everything that reads bytes of strangers, for as long as you like. README.md says what to do with a find.
#
# Usage: sh contrib/fuzz/run.sh [SECONDS PER TARGET, default 3600] [FOLDER, default ./fuzz-work] [TARGET]...
# Environment: PYTHON, an interpreter in which `pip install -e .[test]` was done (default: python3).
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd -P)
seconds=${1:-3600}
work=${2:-$PWD/fuzz-work}
[ $# -lt 1 ] || shift
[ $# -lt 1 ] || shift
[ $# -gt 0 ] || set -- header record image source name profile client server replies

status=0
for target in "$@"; do
    mkdir -p "$work/$target"
    printf '== %s, %s s\n' "$target" "$seconds"
    "${PYTHON:-python3}" "$root/tests/fuzz/targets.py" "$target" "$work/$target" "$root/tests/fuzz/corpus/$target" \
        "-max_total_time=$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=4096 -print_final_stats=1 \
        "-artifact_prefix=$work/$target-" || status=1
done
[ "$status" -eq 0 ] || printf 'found something: see %s/*-crash-*, *-timeout-*, *-oom-*\n' "$work" >&2
exit "$status"
