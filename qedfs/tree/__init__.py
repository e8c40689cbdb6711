"""Names, inodes, attributes and open handles of the mount; knows nothing of FUSE."""
