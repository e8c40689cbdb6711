"""One virtual disk: joins an image and its backing."""
