"""The result of a check, as `qemu-img check` would tell it."""

from __future__ import annotations

from typing import Any

from qedfs.image.check import CheckResult

CORRUPT, LEAKED, UNCHECKED = 2, 3, 1
"""Exit statuses, those of `qemu-img check`."""


def exit_status(result: CheckResult) -> int:
    """Return the exit status for what is left after a repair, if there was one."""
    if result.check_errors:
        return UNCHECKED
    if result.corruptions:
        return CORRUPT
    return LEAKED if result.leaks else 0


def check_json(path: str, result: CheckResult) -> dict[str, Any]:
    """Return the fields of `qemu-img check --output=json`, which leaves out what is 0, and `free-clusters`."""
    counts = {
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "corruptions": result.corruptions,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks": result.leaks,
        "leaks-fixed": result.leaks_fixed,
        "free-clusters": result.free_clusters,
    }
    report: dict[str, Any] = {"filename": path, "format": "qed", "check-errors": result.check_errors}
    return report | {name: count for name, count in counts.items() if count}


def check_text(result: CheckResult) -> str:
    """Return what was repaired, what is left, and how much of the disk is allocated."""
    lines = []
    if result.corruptions_fixed or result.leaks_fixed:
        lines.append(f"Repaired: {result.corruptions_fixed} corruptions, {result.leaks_fixed} leaked clusters.")
    if result.corruptions:
        lines.append(f"{result.corruptions} errors: data may be lost, or appear in two places.")
    if result.leaks:
        lines.append(f"{result.leaks} leaked clusters: room that nothing uses; --repair gives it back.")
    if result.check_errors:
        lines.append(f"{result.check_errors} tables could not be read.")
    if not (result.corruptions or result.leaks or result.check_errors):
        lines.append("No errors were found on the image.")
    if result.free_clusters:
        lines.append(f"{result.free_clusters} free clusters: they take no room and will be used again.")
    if result.total_clusters:
        share = 100 * result.allocated_clusters / result.total_clusters
        apart = 100 * result.fragmented_clusters / max(1, result.allocated_clusters)
        lines.append(
            f"{result.allocated_clusters}/{result.total_clusters} = {share:.2f}% allocated, {apart:.2f}% fragmented"
        )
    return "\n".join(lines)
