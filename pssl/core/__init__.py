"""What every part of pssl stands on: files, ranks, threads, log, seeds, checkpoints; no images, no networks."""
