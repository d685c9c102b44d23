"""Run the PTX that Triton compiles, on a CPU.

The interpreter runs what a kernel says; this runs what the compiler made of it: layouts, vector
accesses, shuffles, shared memory, inline assembly, atomics. ``parse`` reads the text, ``operands``
and ``instructions`` make functions of it, ``arithmetic`` and ``accesses`` say what they do,
``memory`` checks every access, ``copies`` keeps what is on its way, ``machine`` runs a grid of
programs, ``driver`` stands for a GPU.
"""
