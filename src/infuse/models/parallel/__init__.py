"""Decoders over several processes, started by torchrun: shards in a pipeline, tensor parallel, FSDP2 for training.

It all runs on torch.distributed: gloo where the tensors are on CPUs, NCCL where they are on GPUs.
"""
