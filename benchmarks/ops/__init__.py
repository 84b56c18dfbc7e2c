"""One declaration an op: bench_<op>.py holds BENCHMARK."""
