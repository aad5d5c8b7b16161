"""The native CPU kernels: C sources, their build, and the binding."""
