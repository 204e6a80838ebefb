"""How many attentions, norms, gates and rotations a model really executes: read from what an eager run did.

Nothing here knows the graph that torch.compile sees or Infuse's own matchers. `trace` records every ATen operator of
an eager run with its data flow; the other files find the sites in that record.
"""
