"""What runs the method: inputs, the loop, checkpoints, reading, scoring, logging, several processes."""
