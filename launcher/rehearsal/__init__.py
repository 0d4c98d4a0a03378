"""Faults, put on purpose into a small version of a run, on hosts made of network namespaces of one machine."""
