"""The computations as other people write them: what the benchmarks compare with, and some of the tests."""
