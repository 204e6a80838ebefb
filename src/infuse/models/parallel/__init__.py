"""Decoders over several processes, started by torchrun: shards in a pipeline, tensor parallel, FSDP2 for training.

It all runs on torch.distributed: gloo where the tensors are on CPUs, NCCL where they are on GPUs.

- `launch.open_engine`: a checkpoint over all processes, to generate with; `pipeline`, `tensor_parallel`: its parts
- `data_parallel`, `tensor_parallel.parallelize`, `pipeline_training`: three ways to train, the first two together too
- `saving.save_over_ranks`: a checkpoint from what the processes hold
- `process_group`: joining the job; a process that is lost ends the others with an error that names it (`heartbeat`)
"""
