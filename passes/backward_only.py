"""Keep in the backward what only the backward reads, though it is computed of what the forward has.

Contract
- On entry the graph is AOTAutograd's of forward and backward together, not divided yet.
- The copies of rows along tokens that a gradient of a matrix multiplies are computed where they are multiplied. They
  hold as many bytes as the rows themselves, which the forward has anyway, but for what pads the tokens: so who divides
  the graph by bytes held would have them in the forward for some numbers of tokens, on one rank and not on another.

    values, scales = quantize(x)                      # held
    ...                                               # the end of the forward
    x_t = along_tokens(values, scales)                # here
    of_weight = scaled_mm(g_t, x_t)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from moecompile.passes.joint_graph import calls_of

TAG, IN_BACKWARD = "partitioner_tag", "must_be_in_backward"
"""What AOTAutograd's partitioners look for."""


def keep_in_backward(graph: fx.Graph) -> int:
    """Tags the nodes; returns how many copies there are."""
    copies = calls_of(graph, torch.ops.moecompile.along_tokens.default)
    for copy in copies:
        for node in (copy, *(user for user in copy.users if user.target is operator.getitem)):
            node.meta[TAG] = IN_BACKWARD
    return len(copies)
