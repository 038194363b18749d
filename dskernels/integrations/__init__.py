"""Adapters that run models of other libraries on these operations.

Each module needs the library that it is for, and nothing else in dskernels imports it.
"""
