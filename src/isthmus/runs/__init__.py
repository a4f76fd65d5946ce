"""One command, one file: from checkpoints on disk to a finished run folder."""
