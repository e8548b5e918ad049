"""Our samplers and couplings in the interfaces of other libraries.

``torchebm``: its Langevin sampler. ``zuko``, ``nflows``, ``normflows``: our flow layers as theirs
(each needs that library, which is imported with its module only).
"""
