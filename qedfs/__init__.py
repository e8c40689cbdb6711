"""qedfs: start a machine at once from a disk image that is still somewhere else.

A folder is a layer; imports point down only:

    cli/       one file per command; no logic
    migrate/   moving a running machine here: QMP, the sequence, the way back
    session    composition root: builds the layers, start order and reverse stop order
    fuse/      the only folder that imports pyfuse3: handlers, error boundary, how the loop waits
    tree/      names, inodes, attributes, extended attributes, open handles
    report/    status records and how they are shown
    stream/    when the background copies, how fast and what next
    disk/      one virtual disk: read, write, flush, populate; joins image and backing
    backing/   byte sources by transport and format; retry, identity, policy
    image/     QED structures, allocation, commit, check; the only writes to a leaf
    nbd/       the NBD protocol, both sides, and the server
    config     option records; sizes, rates and durations
    errors     every exception: whose fault, errno for the guest, exit code for the shell
"""

__version__ = "0.1.0"
