"""Token store to training batches: sequence packing, source mixture, shuffled order, tensors.

A batch is a pure function of the store, the seed and the step, so that there is no dataloader
state to save. Start with `step_batches.py`, then `packing.py` (sequences) and `order.py`
(shuffling).
"""
