"""Instruments that examine kernels on a machine without a GPU.

``interpreter``, ``traffic`` and ``scheduler`` need a process in which ``TRITON_INTERPRET=1`` was
set before triton was imported. ``fake_driver`` and ``ptx`` need a process in which it was not.
"""
