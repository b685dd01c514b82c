"""Floor 0: solvers for z = f(z) and A x = b on batches of vectors `(B, n)`.

One algorithm a file. All are per sample: what a sample gets does not depend on its batch mates,
and one that fails is flagged without touching the others. (On an accelerator mates may affect when
a sample begins to be accelerated, so there its answer is the same within the tolerance only.) None
builds a graph or knows of gradients; `deep_implicit_attention.deq` does.
"""

from ._anderson import anderson
from ._broyden import broyden
from ._gmres import gmres
from ._newton_krylov import newton_krylov
from ._picard import picard
from ._solution import Solution, Status

__all__ = ["Solution", "Status", "anderson", "broyden", "gmres", "newton_krylov", "picard"]
