"""What a mechanism says of some samples of a batch."""

import torch
from torch.utils import _pytree as pytree


def test_rows_of_the_context_are_those_of_the_update(case, x):
    module = case.module.train()
    if getattr(module, "dropout", None) is not None:
        module.dropout = 0.5
    context = module.prepare(module.sources(x, *case.inputs), *case.inputs)
    state = module.initial_state(x)
    state = pytree.tree_map(torch.randn_like, state)
    whole = module.update(state, context)
    for index in (torch.tensor([2, 0]), torch.tensor([1])):
        few = pytree.tree_map(lambda t, index=index: t[index], state)
        found = module.update(few, module.select_samples(index, context))
        for mine, other in zip(*map(pytree.tree_leaves, (found, whole)), strict=True):
            torch.testing.assert_close(mine, other[index], rtol=1e-12, atol=1e-12)
