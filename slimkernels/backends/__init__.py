"""How the ops are computed: one folder a backend, one module an op, the op's name everywhere."""
