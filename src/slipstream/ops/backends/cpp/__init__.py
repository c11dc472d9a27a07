"""C++ kernels for CPUs, compiled on first use by the machine's own compiler; without one the torch forms run.

A kernel is a .cpp file and, beside it under the same name, the Python file that offers it as a backend of the op of that name.
"""
