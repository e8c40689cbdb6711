"""QED images: structures, allocation, commit, check."""
