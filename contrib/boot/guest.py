"""Make a small Linux guest from Debian or Ubuntu packages: a kernel, an initramfs, and a raw disk with an ext4 root.

    python -m contrib.boot.guest [FOLDER]

makes it below FOLDER (default: `qedfs` in the user's cache directory) and prints where. Needs no privileges, installs nothing,
and downloads the kernel and busybox only once: a guest that was made is found again at no cost until its recipe changes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contrib.boot import workload

HERE = Path(__file__).parent
RECIPE = ("guest.py", "workload.py", "initramfs-init", "guest-init")
DISK_BYTES = 256 << 20
KERNELS = ("linux-image-cloud-amd64", "linux-image-virtual")
"""Packages that depend on the newest kernel for virtual machines: Debian's, Ubuntu's."""
DRIVERS = ("virtio_pci", "virtio_mmio", "virtio_blk", "ext4")


class BootError(Exception):
    """Something went wrong; the message is one line for a person."""


@dataclass(frozen=True)
class Guest:
    """The files of a guest, all in one folder that is complete or not there."""

    folder: Path

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        return self.folder / "initramfs"

    @property
    def disk(self) -> Path:
        """The base image: raw, sparse, with an ext4 file system without a partition table."""
        return self.folder / "base.raw"

    def sums(self) -> dict[str, str]:
        """Return the SHA-256 of every regular file on the disk by its path."""
        sums: dict[str, str] = json.loads((self.folder / "sums.json").read_text())
        return sums


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qedfs"


def made(folder: Path) -> Guest:
    """Return the guest below `folder`, making it if it is not there yet.

    Raises:
        BootError: a tool is missing or fails, or a package cannot be downloaded. Nothing is left behind.
    """
    recipe = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in RECIPE)).hexdigest()[:12]
    guest = Guest(folder / f"guest-{recipe}")
    if guest.folder.exists():
        return guest
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as making:
        draft = Guest(Path(making) / "guest")
        draft.folder.mkdir()
        make(draft, Path(making))
        try:
            # Ordering: the name appears only now, so that a half-made guest is never taken for a good one.
            draft.folder.rename(guest.folder)
        except OSError:
            if not guest.folder.exists():  # else somebody was faster, and theirs is as good
                raise
    return guest


def make(guest: Guest, work: Path) -> None:
    """Fill the empty folder of `guest`; `work` is room for what is not needed later."""
    unpacked = work / "unpacked"
    for package in [*kernel_packages(), "busybox-static"]:
        unpack(package, work / "packages", unpacked)
    (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
    shutil.copyfile(kernel, guest.kernel)
    (busybox,) = (path for path in unpacked.glob("**/bin/busybox") if path.is_file())
    make_initramfs(guest, busybox, modules(unpacked), work / "initramfs")
    make_disk(guest, busybox, work / "root")


def run(*command: str | Path, cwd: Path | None = None, stdin: str = "", timeout: float = 300) -> str:
    """Run a tool for at most `timeout` seconds and return its standard output.

    Raises:
        BootError: it is not installed, takes too long, or fails; the message has the last line it printed as its error.
    """
    # Debian keeps mke2fs and its kin where only root looks for programs, though they need no privileges.
    environment = os.environ | {"LC_ALL": "C", "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    try:
        done = subprocess.run(
            command, cwd=cwd, input=stdin, env=environment, capture_output=True, text=True, timeout=timeout, check=True
        )
    except FileNotFoundError as error:
        raise BootError(f"{command[0]}: not installed") from error
    except subprocess.TimeoutExpired as error:
        raise BootError(f"{command[0]}: not finished after {timeout:.0f} s") from error
    except subprocess.CalledProcessError as error:
        complaint = (error.stderr or error.stdout).strip().splitlines() or [f"exit status {error.returncode}"]
        raise BootError(f"{command[0]}: {complaint[-1]}") from error
    return done.stdout


def kernel_packages() -> list[str]:
    """Return the packages with the newest kernel for virtual machines and its modules."""
    for kernel in KERNELS:
        try:
            images = dependencies(kernel, "linux-image-")
        except BootError:
            continue
        return images + [package for image in images for package in dependencies(image, "linux-modules-")]
    raise BootError(
        f"no package {' or '.join(KERNELS)} is known to apt (apt-get update helps where the lists are missing)"
    )


def dependencies(package: str, prefix: str) -> list[str]:
    """Return the packages `prefix` + version that `package` depends on, as apt knows them."""
    return re.findall(rf"Depends: ({prefix}\d\S+)$", run("apt-cache", "depends", package), re.MULTILINE)


def unpack(package: str, downloads: Path, into: Path) -> None:
    """Download a package and unpack its files below `into`, without installing it."""
    downloads.mkdir(exist_ok=True)
    try:
        # The unprivileged user that apt likes to download as cannot write to our folder.
        run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=downloads)
    except BootError as error:
        raise BootError(f"cannot download {package}: {error}") from error
    (archive,) = downloads.glob(f"{package}_*.deb")
    run("dpkg-deb", "-x", archive, into)


def modules(unpacked: Path) -> list[bytes]:
    """Return the kernel modules that the drivers of the disk need, in the order to load them; built-in ones are left out."""
    (tree,) = (path.parent for path in unpacked.glob("**/lib/modules/*/kernel"))
    builtin = {Path(line).name for line in (tree / "modules.builtin").read_text().splitlines()}
    files = {path.name.partition(".")[0].replace("-", "_"): path for path in tree.glob("kernel/**/*.ko*")}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or f"{name}.ko" in builtin:
            return
        if name not in files:
            raise BootError(f"{tree.name}: the kernel has no driver {name}")
        content = decompressed(files[name])
        needed = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in needed[1].decode().split(",") if needed and needed[1] else ():
            load(other.replace("-", "_"))
        loaded[name] = content

    for driver in DRIVERS:
        load(driver)
    return list(loaded.values())


def decompressed(module: Path) -> bytes:
    content = module.read_bytes()
    match module.suffix:
        case ".ko":
            return content
        case ".xz":
            return lzma.decompress(content)
        case ".gz":
            return gzip.decompress(content)
    raise BootError(f"{module.name}: compressed in a way this program does not know")


def place(source: Path, target: Path) -> None:
    """Copy a program to `target`, executable."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)


def make_initramfs(guest: Guest, busybox: Path, drivers: Sequence[bytes], tree: Path) -> None:
    for folder in ("dev", "modules", "root"):
        (tree / folder).mkdir(parents=True)
    place(busybox, tree / "bin/busybox")
    place(HERE / "initramfs-init", tree / "init")
    for number, driver in enumerate(drivers):
        (tree / "modules" / f"{number:02}").write_bytes(driver)
    names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
    run("cpio", "--quiet", "-o", "-H", "newc", "-O", guest.initramfs.absolute(), cwd=tree, stdin=names)


def make_disk(guest: Guest, busybox: Path, tree: Path) -> None:
    for folder in ("dev", "proc", "base"):
        (tree / folder).mkdir(parents=True)
    place(busybox, tree / "bin/busybox")
    place(HERE / "guest-init", tree / "sbin/init")
    for path, content in workload.base_files().items():
        (tree / path.lstrip("/")).write_bytes(content)
    (guest.folder / "sums.json").write_text(json.dumps(sums_of(tree), indent=1))
    with guest.disk.open("xb") as disk:
        disk.truncate(DISK_BYTES)
    # Initialised at once, or the guest's kernel would go on initialising in the background and write at random.
    run(
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-E",
        "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0",
        "-d",
        tree,
        guest.disk,
    )


def sums_of(tree: Path) -> dict[str, str]:
    """Return the SHA-256 of every regular file below `tree`, by its path from there (with a slash in front)."""
    files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    return {f"/{path.relative_to(tree)}": workload.sha256(path.read_bytes()) for path in files}


if __name__ == "__main__":
    try:
        print(made(Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()).folder)
    except BootError as failure:
        sys.exit(f"guest: {failure}")
